"""Ranks on simulated NPUs: every collective, and DDP over hccl against gloo on the CPU.

Run by the launcher this file is the program of one rank.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytestmark = [pytest.mark.npu_sim, pytest.mark.every_version]
RANKS = 2
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
RESULTS = {"SUM": 9.0, "MAX": 6.0, "MIN": 3.0, "PRODUCT": 18.0}  # of 3 and 6


def launch(*arguments: str, **variables: str) -> dict:
    """Run this file on two ranks; what rank 0 printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, __file__, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def on_npu():
    return launch("npu")


def test_all_reduce(on_npu):
    for dtype in DTYPES:
        assert on_npu["all_reduce"][str(dtype)] == RESULTS, dtype


def test_other_collectives(on_npu):
    assert on_npu["broadcast"] == [1.0] * 3
    assert on_npu["all_gather"] == [[0.0] * 3, [1.0] * 3]
    assert on_npu["reduce_scatter"] == [1.0]
    assert on_npu["large"] is True
    assert on_npu["objects"] == [{"rank": 0}, {"rank": 1}]
    assert on_npu["on the host"] == 3


def test_float64_is_refused_as_on_a_device(on_npu):
    assert "Unsupported data type" in on_npu["float64"]


def test_ddp_equals_gloo_on_the_cpu(on_npu):
    on_cpu = launch("cpu")
    assert on_npu["ddp"] == on_cpu["ddp"]
    assert all(run["ranks differ by"] == 0 for run in on_npu["ddp"].values())
    # Full precision, and the two that gradients may travel in: three different results.
    assert len({run["weights"] for run in on_npu["ddp"].values()}) == 3


def collectives(device: torch.device, rank: int) -> dict:
    """What each collective gives on this rank."""
    found = {"all_reduce": {}}
    for dtype in DTYPES:
        values = {}
        for name in RESULTS:
            x = torch.full((3,), 3 * (rank + 1), dtype=dtype, device=device)
            dist.all_reduce(x, getattr(dist.ReduceOp, name))
            values[name] = float(x[1])
        found["all_reduce"][str(dtype)] = values

    x = torch.full((3,), float(rank), device=device)
    dist.broadcast(x, src=1)
    found["broadcast"] = x.tolist()
    gathered = [torch.zeros(3, device=device) for _ in range(RANKS)]
    dist.all_gather(gathered, torch.full((3,), float(rank), device=device))
    found["all_gather"] = [x.tolist() for x in gathered]
    part = torch.zeros(1, device=device)
    dist.reduce_scatter_tensor(part, torch.tensor([rank, rank + 10.0], device=device))
    found["reduce_scatter"] = part.tolist()
    x = torch.arange(600_000.0, device=device)  # more than a slot of the shared memory
    dist.all_reduce(x)
    found["large"] = torch.equal(x.cpu(), RANKS * torch.arange(600_000.0))

    objects = [None] * RANKS
    dist.all_gather_object(objects, {"rank": rank})
    found["objects"] = objects
    x = torch.tensor([rank + 1])
    dist.all_reduce(x)
    found["on the host"] = x.item()
    try:
        dist.all_reduce(torch.zeros(1, dtype=torch.float64, device=device))
    except RuntimeError as error:
        found["float64"] = str(error)
    return found


def data_parallel(device: torch.device, rank: int, half: torch.dtype | None) -> dict:
    """Losses of a few steps, a checksum of the weights, how far ranks are apart."""
    from common.npu.distributed import parallel

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).to(device)  # fmt: skip
    network = parallel(model, half)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    draws, losses = torch.Generator().manual_seed(rank), []
    for _ in range(6):
        images = torch.randn(4, 3, 8, 8, generator=draws).to(device)
        labels = torch.randint(5, (4,), generator=draws).to(device)
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    gathered = [torch.zeros_like(weights) for _ in range(RANKS)]
    dist.all_gather(gathered, weights)
    return {
        "losses": losses,
        "weights": weights.cpu().double().sum().item(),
        "ranks differ by": (gathered[0] - gathered[1]).abs().max().item(),
    }


def main(kind: str) -> None:
    from common.npu.device import setup_device
    from common.npu.distributed import Ranks, start

    ranks = Ranks.from_environment()
    device, _ = setup_device(kind, ranks.local_rank)
    start(device, ranks, 60)
    found = collectives(device, ranks.rank) if kind == "npu" else {}
    found["ddp"] = {
        str(half): data_parallel(device, ranks.rank, half)
        for half in (None, torch.float16, torch.bfloat16)
    }
    if ranks.main:
        print(json.dumps(found), flush=True)
    gc.collect()  # as the programs do: torch 2.6 may hang where something keeps the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
