"""`--cache ram`: the memory of a host's processes, how it is filled and who may read it."""

import multiprocessing
import os
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.files import Extent
from common.npu import distributed, file_cache
from common.npu.distributed import Ranks
from common.npu.file_cache import FileCache, filled_cache
from tests import scripts

CPU = torch.device("cpu")


def never():
    return False


@pytest.fixture
def extents(tmp_path):
    """Files of several sizes, one of them empty, and a part of a file."""
    found = []
    for number, size in enumerate([5, 0, 100_000, 1, 70_000]):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(bytes([number + 1]) * size)
        found.append(Extent(str(path)))
    (tmp_path / "part.bin").write_bytes(b"0123456789")
    return [*found, Extent(str(tmp_path / "part.bin"), offset=3, length=4)]


def contents(extents):
    return [*(Path(extent.path).read_bytes() for extent in extents[:-1]), b"3456"]


class Files(Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache.offsets) - 1

    def __getitem__(self, i):
        return self.cache.read(i), os.fstat(self.cache._file.fileno()).st_ino


def first(samples):
    return samples[0]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_read_the_same_memory(extents, start_method):
    expected = contents(extents)
    lines = []
    cache = filled_cache(extents, Ranks(), never, lines.append)
    for extent in extents:
        os.unlink(extent.path)  # nothing is read of a file any more
    loader = DataLoader(
        Files(cache), num_workers=2, multiprocessing_context=start_method, collate_fn=first
    )
    inode = os.fstat(cache._file.fileno()).st_ino
    assert list(loader) == [(content, inode) for content in expected]
    assert re.fullmatch(
        r"--cache ram: 6 images, 0\.00 GiB of their files in memory after \d+\.\d s "
        r"\(\d+ images/s\); a read takes \d\.\d+ ms, from the files it took \d+\.\d+ ms.*",
        lines[0],
    )


def test_what_a_worker_that_is_not_forked_gets_is_small(tmp_path):
    (tmp_path / "large").write_bytes(bytes(20_000_000))
    cache = filled_cache([Extent(str(tmp_path / "large"))] * 2, Ranks(), never, print)
    assert len(pickle.dumps(cache)) < 2000
    assert pickle.loads(pickle.dumps(cache)).read(1) == bytes(20_000_000)


def member(rank, port, extents, results):
    """A rank that fills its share, and reads what the other one has filled."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    ranks = Ranks(rank, rank, 2, 2)
    distributed.start(CPU, ranks, timeout_seconds=100)
    filled = []

    class Noted(FileCache):
        def fill(self, i, extent):
            filled.append(i)
            super().fill(i, extent)

    file_cache.FileCache = Noted
    cache = filled_cache(extents, ranks, never, print)
    read = [cache.read(i) for i in range(len(extents))]
    outcome = (sorted(filled), read, os.fstat(cache._file.fileno()).st_ino)
    # What a rank cannot do all ranks raise.
    messages = []
    for free, more in ((1, []), (2**40, [Extent("/none/of/these")])):
        file_cache.free_memory = lambda free=free: free
        try:
            filled_cache([*extents, *more], ranks, never, print)
        except UserError as error:
            messages.append(str(error))
    results.put((rank, outcome, messages))
    ranks.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_fill_one_memory(extents):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    port = scripts.free_port()
    members = [
        context.Process(target=member, args=(rank, port, extents, results)) for rank in (0, 1)
    ]
    for process in members:
        process.start()
    of_ranks = sorted(results.get(timeout=200) for _ in members)
    for process in members:
        process.join(30)
        assert process.exitcode == 0
    (_, first_one, messages), (_, second_one, messages_of_second) = of_ranks
    assert [first_one[0], second_one[0]] == [[0, 2, 4], [1, 3, 5]]
    assert first_one[1] == second_one[1] == contents(extents)
    assert first_one[2] == second_one[2]
    assert messages == messages_of_second
    assert "are free" in messages[0]
    assert messages[1].startswith("--cache ram: /none/of/these cannot be read (No such file")


def hold(extents, results):
    cache = filled_cache(extents, Ranks(), never, print)
    results.put((cache.path, os.readlink(cache.path)))
    signal.pause()


def test_a_killed_process_leaves_nothing(extents):
    before = sorted(os.listdir("/dev/shm"))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    holder = context.Process(target=hold, args=(extents, results))
    holder.start()
    path, target = results.get(timeout=60)
    assert os.path.exists(path)
    assert target.endswith("(deleted)")  # it has no name by which it could stay
    holder.kill()
    holder.join()
    assert not os.path.exists(path)
    assert sorted(os.listdir("/dev/shm")) == before


def test_what_does_not_fit_is_refused_with_both_numbers(extents, monkeypatch):
    monkeypatch.setattr(file_cache, "free_memory", lambda: 2**30)
    files = [Extent("/a", 0, 2**29), Extent("/b", 0, 2**29)]
    monkeypatch.setattr(file_cache, "_seconds_a_read", lambda extents: 0.0)
    with pytest.raises(
        UserError,
        match=r"^--cache ram: 2 images take 1\.00 GiB, more than 90% of the 1\.00 GiB of memory "
        r"that are free; omit --cache, or train on a part with --subset$",
    ):
        filled_cache(files, Ranks(), never, print)


@pytest.mark.parametrize("size", [4, 6])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path, monkeypatch, size):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(size))
    monkeypatch.setattr(file_cache, "_seconds_a_read", lambda extents: 0.0)
    monkeypatch.setattr(file_cache, "_length", lambda extent: 5)
    with pytest.raises(UserError, match=r"a\.bin cannot be read \(its size changes\); check the"):
        filled_cache([Extent(str(path))], Ranks(), never, print)


def test_a_stopped_run_does_not_wait(extents):
    lines = []
    assert filled_cache(extents, Ranks(), lambda: True, lines.append) is None
    assert lines == []


def test_the_log_says_when_it_does_not_pay():
    slow = file_cache.report(1000, 2**30, 10.0, file_cache.Sample(0.0123, 0.00004))
    assert slow == (
        "--cache ram: 1000 images, 1.00 GiB of their files in memory after 10.0 s (100 images/s); "
        "a read takes 0.040 ms, from the files it took 12.300 ms"
    )
    fast = file_cache.report(1000, 2**30, 10.0, file_cache.Sample(0.0001, 0.00004))
    assert fast.endswith("little is gained")
