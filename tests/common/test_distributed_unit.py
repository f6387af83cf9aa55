import copy
import gc
import multiprocessing
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.npu import distributed
from common.npu.addresses import free_port
from common.npu.distributed import Ranks
from common.npu.precision import HalfWeights

CPU = torch.device("cpu")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture
def environment(monkeypatch):
    def give(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return Ranks.from_environment()

    return give


def test_without_a_launcher_there_is_one_rank(environment):
    for given in ({}, {"RANK": "1"}, {"WORLD_SIZE": "8", "RANK": "3"}):
        assert environment(**given) == Ranks(0, 0, 1, 1)


def test_ranks_of_a_launcher(environment):
    ranks = environment(RANK="11", LOCAL_RANK="3", WORLD_SIZE="16", LOCAL_WORLD_SIZE="8")
    assert ranks == Ranks(rank=11, local_rank=3, world_size=16, local_world_size=8)
    assert not ranks.main
    assert ranks.card(5) == 3
    alone = environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    assert alone.main
    assert alone.card(5) == 5


def test_alone_nothing_needs_a_process_group():
    alone = Ranks()
    distributed.start(CPU, alone)
    assert not torch.distributed.is_initialized()
    assert [alone.any(flag) for flag in (True, False)] == [True, False]
    assert alone.all_gather_objects("x") == ["x"]
    alone.barrier()
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(3)
    distributed.average_buffers(norm, alone)
    assert norm.running_mean.tolist() == [3, 3]


def meet(store, rank, results):
    ranks = Ranks(rank=rank, world_size=3)
    results[rank] = distributed.meet(store, ranks, timedelta(seconds=20))


def names_of_start(store):
    """What three ranks that start at the same time call their start."""
    results = {}
    threads = [threading.Thread(target=meet, args=(store, rank, results)) for rank in range(3)]
    # Rank 0 last: the others meet what is left of a former start.
    for thread in reversed(threads):
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(3)]


def test_ranks_that_start_anew_do_not_meet_those_of_the_former_start():
    store = torch.distributed.HashStore()
    first = names_of_start(store)
    second = names_of_start(store)
    assert len(set(first)) == 1
    assert len(set(second)) == 1
    assert first != second


def test_ranks_that_wait_for_others_in_vain_say_so(environment, monkeypatch):
    port = str(free_port())
    alone = environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=r"the ranks do not meet \(.+\); see whether all"):
        distributed.start(CPU, alone, timeout_seconds=1)
    assert not torch.distributed.is_initialized()


def test_mean_of_buffers():
    buffers = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}]
    assert distributed.mean_buffers(buffers)["a"].tolist() == [2, 4]


def member(rank, port, queue):
    """What one of two ranks sees."""
    import os

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    ranks = Ranks.from_environment()
    distributed.start(CPU, ranks, timeout_seconds=60)
    seen = {
        "any": [ranks.any(rank == 1), ranks.any(False)],
        "all": ranks.all_gather_objects({"rank": rank}),
    }
    ranks.barrier()

    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    model[1].running_mean.fill_(rank)
    images, alone = torch.arange(6.0).view(2, 3) + rank, copy.deepcopy(model)
    for half in (None, torch.bfloat16):
        wrapped = distributed.parallel(model, half)
        model.zero_grad()
        alone(images)
        wrapped(images).square().sum().backward()
        seen[str(half)] = [p.grad.clone().tolist() for p in model.parameters()]
    seen["own buffers"] = model[1].running_mean.tolist()
    seen["buffers alone"] = alone[1].running_mean.tolist()
    gathered = distributed.gather_buffers(model, ranks)
    seen["gathered"] = [buffers["1.running_mean"].tolist() for buffers in gathered]
    distributed.average_buffers(model, ranks)
    seen["averaged"] = model[1].running_mean.tolist()

    layers = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    for parameter in layers.parameters():
        nn.init.constant_(parameter, 0.3)
    networks = {"cast singly": layers, "cast in groups": HalfWeights(layers, torch.bfloat16)}
    for name, network in networks.items():
        wrapped = distributed.parallel(network, torch.bfloat16)
        for _ in range(2):  # DistributedDataParallel makes its buckets anew after the first
            layers.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = wrapped(images)
            outputs.float().square().sum().backward()
        seen[name] = [parameter.grad.tolist() for parameter in layers.parameters()]

    # As torch does on its own, sooner or later.
    from torch.distributed.nn import functional  # noqa: F401

    del wrapped
    gc.collect()
    torch.distributed.destroy_process_group()
    seen["threads"] = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    queue.put((rank, seen))


def test_two_ranks():
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    members = [context.Process(target=member, args=(rank, port, queue)) for rank in (0, 1)]
    for process in members:
        process.start()
    seen = dict(queue.get(timeout=200) for _ in members)
    for process in members:
        process.join(30)
        assert process.exitcode == 0

    assert seen[0]["any"] == seen[1]["any"] == [True, False]
    assert seen[0]["all"] == seen[1]["all"] == [{"rank": 0}, {"rank": 1}]
    # Threads of a group that lives on may abort the process at its end.
    assert not [name for rank in (0, 1) for name in seen[rank]["threads"] if "gloo" in name]
    for half in ("None", "torch.bfloat16"):
        assert seen[0][half] == seen[1][half]  # gradients are the mean over ranks
    for exact, half in zip(seen[0]["None"], seen[0]["torch.bfloat16"], strict=True):
        torch.testing.assert_close(torch.tensor(half), torch.tensor(exact), rtol=0.02, atol=0.02)
    assert seen[0]["cast in groups"] == seen[1]["cast in groups"] == seen[0]["cast singly"]
    for rank in (0, 1):  # no rank's buffers are broadcast to the others
        assert seen[rank]["own buffers"] == seen[rank]["buffers alone"]
    assert seen[0]["own buffers"] != seen[1]["own buffers"]
    assert seen[0]["gathered"] == seen[1]["gathered"]
    assert seen[0]["gathered"] == [seen[rank]["own buffers"] for rank in (0, 1)]
    means = zip(seen[0]["own buffers"], seen[1]["own buffers"], strict=True)
    expected = [(a + b) / 2 for a, b in means]
    assert seen[0]["averaged"] == seen[1]["averaged"] == pytest.approx(expected)
