import os
import platform
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from common.npu import loading
from common.npu.distributed import Ranks


def ranks_on(*cores):
    """Ranks of this host, each with the cores that it may use, and one of another host."""
    hosts = [(platform.node(), frozenset(of_rank)) for of_rank in cores]
    hosts.append(("another", frozenset(range(24))))
    return SimpleNamespace(all_gather_objects=lambda own: hosts)


def test_workers_are_as_many_as_asked_for_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(loading, "CORES_AT_START", frozenset(range(24)))
    assert [loading.workers_per_rank(count, Ranks()) for count in (0, 5, 40)] == [0, 5, 40]
    shares = []
    for num_ranks in (1, 2, 8, 24, 30):
        ranks = ranks_on(*[range(24)] * num_ranks)
        shares.append(loading.workers_per_rank(-1, ranks))
    assert shares == [16, 11, 2, 0, 0]


def test_a_rank_that_is_bound_to_its_own_cores_has_them_all(monkeypatch):
    bound = [range(first, first + 10) for first in (0, 10, 20, 30)]
    monkeypatch.setattr(loading, "CORES_AT_START", frozenset(bound[1]))
    assert loading.workers_per_rank(-1, ranks_on(*bound)) == 9
    in_pairs = [bound[0], bound[1], bound[1], bound[0]]
    assert loading.workers_per_rank(-1, ranks_on(*in_pairs)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_the_options(workers):
    options = loading.loader_options(workers, pin_memory=False)
    assert list(DataLoader([1, 2, 3], **options)) == [1, 2, 3]


def test_a_worker_outlives_the_signals_for_a_minute(monkeypatch):
    sent = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in sent}
    alarms = []
    monkeypatch.setattr(signal, "alarm", alarms.append)
    try:
        loading.outlive_signals(0)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert alarms == [60]


def test_the_first_batch_is_repeated():
    loader = DataLoader([1, 2, 3])
    assert [batch.item() for batch in loading.repeat_first_batch(loader)] == [1, 1, 1]


@pytest.fixture
def gib_of_host(tmp_path, monkeypatch):
    """Give the host 3 GiB of memory and 1 GiB of swap; the function limits a container."""
    info = tmp_path / "meminfo"
    info.write_text(
        "MemTotal: 3145728 kB\nMemFree: 1 kB\nMemAvailable: 2097152 kB\n"
        "SwapTotal: 1048576 kB\nHuge: 0\n"
    )
    monkeypatch.setattr(loading, "MEMORY_INFO", info)
    groups = []
    for version in ("", "v1_"):
        names = ("max", "current", "stat")
        groups.append(loading.ControlGroup(*(tmp_path / f"{version}{name}" for name in names)))
    monkeypatch.setattr(loading, "CONTROL_GROUPS", tuple(groups))
    return lambda limit: (tmp_path / "max").write_text(f"{limit}\n")


def test_a_batch_that_the_host_cannot_hold_is_refused(gib_of_host):
    cuda = torch.device("cuda")
    two_ranks = Ranks(local_world_size=2)
    image = (1024, 1024)  # 3 MiB
    loading.require_memory_for_batch(682, image, two_ranks, cuda)
    with pytest.raises(
        UserError,
        match=r"^--batch_size 683: the images of one batch take 4\.0 GiB for the ranks of this "
        r"host, which has 4\.0 GiB of memory; give a smaller one$",
    ):
        loading.require_memory_for_batch(683, image, two_ranks, cuda)
    # A CPU also holds the floats of the network's input.
    loading.require_memory_for_batch(273, image, Ranks(), torch.device("cpu"))
    with pytest.raises(UserError, match=r"--batch_size 274: .* 4\.0 GiB"):
        loading.require_memory_for_batch(274, image, Ranks(), torch.device("cpu"))


def test_a_container_has_less_memory(gib_of_host):
    gib_of_host("max")
    assert loading.host_memory() == 4 * 2**30
    gib_of_host(2**30)
    assert loading.host_memory() == 2 * 2**30


def test_what_is_free_counts_what_the_system_holds_of_files(gib_of_host, tmp_path):
    assert loading.free_memory() == 2 * 2**30
    (tmp_path / "current").write_text(f"{2**30}\n")
    (tmp_path / "stat").write_text(f"anon {2**28}\ninactive_file {2**28}\nactive_file 1024\n")
    gib_of_host("max")
    assert loading.free_memory() == 2 * 2**30
    gib_of_host(2**30 + 2**20)
    assert loading.free_memory() == 2**20 + 2**28 + 1024


def test_nothing_is_refused_where_the_memory_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "MEMORY_INFO", tmp_path / "none")
    loading.require_memory_for_batch(10**9, (300, 300), Ranks(), torch.device("cpu"))
    assert loading.free_memory() is None
