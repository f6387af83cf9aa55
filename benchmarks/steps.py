"""Training steps side by side: what the step.py of the models share."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Timing, print_table, race, ratio
from common.npu.device import DEVICES, has_bf16, in_host_memory, memory_format
from common.npu.precision import Precision

LR = 1e-6  # small: random weights must not diverge while they are timed
# Side of the square matrices whose product shows a device's rate.
SIDE_ON_CPU = 2048
SIDE = 8192
PRODUCTS = 5  # of which the best counts, which other load hits least
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments(description: str, batch_size: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that all step.py have."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default=str(root / "tests/data/tiny_coco"))
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def precisions(device: torch.device) -> dict[str, Precision]:
    """Return fp32, and bf16 by autocast where the device has it: emulated, it takes minutes."""
    precisions = {"fp32": Precision(device, "O0")}
    if has_bf16(device):
        precisions["bf16"] = Precision(device, "O1", dtype="bf16")
    return precisions


def torchvision_step(
    model: nn.Module,
    optimizer: Optimizer,
    images: list[Tensor],
    targets: list[dict],
    precision: Precision,
) -> Callable[[], None]:
    """Return a step of one of torchvision's detectors, which normalise and match themselves."""

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        synchronize(precision.device)

    return run


def placed(model: nn.Module, device: torch.device, fast: bool = True) -> nn.Module:
    """Return the model on the device, ready to train.

    `fast`: in the layout that convolutions are fastest in, as train.py has it.
    """
    layout = memory_format(device) if fast else torch.contiguous_format
    return model.to(device, memory_format=layout).train()


def synchronize(device: torch.device) -> None:
    """Wait for everything issued to the device."""
    if not in_host_memory(device):
        torch.accelerator.synchronize()


def clock(timing: Timing, device: torch.device) -> np.ndarray:
    """Return seconds of the process on a CPU, which other load inflates least; else of the wall."""
    return timing.cpu if in_host_memory(device) else timing.wall


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product."""
    side = SIDE_ON_CPU if in_host_memory(device) else SIDE
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(left, right)
        synchronize(device)

    timing = race({"product": product}, PRODUCTS)["product"]
    return 2 * side**3 / clock(timing, device).min()


def flops(step: Callable[[], None]) -> int:
    """Return the FLOPs of a step in matrix products and convolutions, backward pass included."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def print_steps(
    title: str,
    peers: dict[tuple[str, str], Callable[[], None]],
    args: argparse.Namespace,
    device: torch.device,
    yardstick: str,
) -> None:
    """Time the peers, named (who, precision), and print a table.

    Their speeds are relative to those of the peer `yardstick`, in fp32 and in their own precision.
    """
    rates = {name: matrix_rate(device, DTYPES[name]) for name in precisions(device)}
    work = {name: flops(step) for name, step in peers.items()}  # warms up, too
    seconds = {}
    for name, timing in race(peers, args.rounds, warmup=0).items():
        seconds[name] = clock(timing, device)
    rows = []
    for name, own_seconds in seconds.items():
        who, precision = name
        median = np.median(own_seconds)
        rows.append(
            (
                who,
                precision,
                f"{args.batch_size / median:.2f}",
                f"{ratio(seconds[yardstick, 'fp32'], own_seconds):.2f}",
                f"{ratio(seconds[yardstick, precision], own_seconds):.2f}",
                f"{work[name] / args.batch_size / 1e9:.0f}",
                f"{work[name] / median / rates[precision]:.2f}",
            )
        )
    header = (
        "",
        "precision",
        "images a CPU second" if in_host_memory(device) else "images/s",
        f"speed, {yardstick} in fp32 = 1",
        "speed, the same in this precision = 1",
        "GFLOP an image",
        "fraction of the matrix rate",
    )
    print_table(f"{title} on {device.type}, batch {args.batch_size}", header, rows)
    measured = [f"{rate / 1e12:.2f} TFLOP/s {name}" for name, rate in rates.items()]
    print(f"Matrix rate: {', '.join(measured)}.\n")
