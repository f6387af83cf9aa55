"""Training steps side by side: what the step.py of the models share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Timing, print_table, race, ratio
from common.fps.window import LossWindow
from common.npu.device import DEVICES, memory_format
from common.npu.precision import Precision

LR = 1e-6  # small: random weights must not diverge while they are timed
SIDE = {"cpu": 2048}  # of the square matrices whose product shows a device's rate; else 8192


def arguments(description: str, batch_size: int) -> argparse.ArgumentParser:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default=str(root / "tests/data/tiny_coco"))
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def precisions(device: torch.device) -> dict[str, Precision]:
    """fp32, and bf16 by autocast."""
    half = Precision(device, "O1", dtype="bf16")
    return {"fp32": Precision(device, "O0"), "bf16": half}


def our_step(
    train: ModuleType, recipe, model: nn.Module, optimizer: Optimizer, batch, precision: Precision
) -> Callable[[], None]:
    """A step as the model's train.py makes it: its own method, on the few attributes it uses.

    The loss terms are fetched after each step, as for a log line.
    """
    device = precision.device
    training = train.Training.__new__(train.Training)
    vars(training).update(
        recipe=recipe,
        device=device,
        precision=precision,
        network=model,
        optimizer=optimizer,
        criterion=train.DetectionLoss(recipe, 80).to(device),
        window=LossWindow(train.LOSSES, device),
        iteration=0,
        lr=lambda iteration: LR,
    )

    def run() -> None:
        training.step(batch)
        losses = training.window.fetch().means()
        training.window = LossWindow(train.LOSSES, device)
        assert np.isfinite(losses["loss"]), losses
        synchronize(device)

    return run


def torchvision_step(
    model: nn.Module,
    optimizer: Optimizer,
    images: list[Tensor],
    targets: list[dict],
    precision: Precision,
) -> Callable[[], None]:
    """A step of one of torchvision's detectors, which normalise and match themselves."""

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        synchronize(precision.device)

    return run


def placed(model: nn.Module, device: torch.device, fast: bool = True) -> nn.Module:
    """Ready to train; `fast`: in the layout that convolutions are fastest in, as train.py does."""
    layout = memory_format(device) if fast else torch.contiguous_format
    return model.to(device, memory_format=layout).train()


def synchronize(device: torch.device) -> None:
    """Wait for everything issued to the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def clock(timing: Timing, device: torch.device) -> np.ndarray:
    """Seconds of the process on a CPU, which other load inflates least, of the wall elsewhere."""
    return timing.cpu if device.type == "cpu" else timing.wall


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the best of five, which other load hits least."""
    side = SIDE.get(device.type, 8192)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        synchronize(device)

    return 2 * side**3 / clock(race({"": product}, 5)[""], device).min()


def flops(step: Callable[[], None]) -> int:
    """Of the matrix products and convolutions of a step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def print_steps(
    title: str, peers: dict[tuple[str, str], Callable[[], None]], args, device: torch.device
) -> None:
    """Time the peers, named (who, precision), and print a table; the last two are the yardstick:
    torchvision's in fp32 and in bf16."""
    rates = {
        name: matrix_rate(device, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    work = {name: flops(step) for name, step in peers.items()}  # warms up, too
    times = {
        name: clock(timing, device) for name, timing in race(peers, args.rounds, warmup=0).items()
    }
    yardstick, in_bf16 = list(peers)[-2:]
    rows = []
    for (who, precision), seconds in times.items():
        same = yardstick if precision == "fp32" else in_bf16
        rows.append(
            (
                who,
                precision,
                f"{args.batch_size / np.median(seconds):.2f}",
                *(f"{ratio(times[peer], seconds):.2f}" for peer in (yardstick, same)),
                f"{work[who, precision] / args.batch_size / 1e9:.0f}",
                f"{work[who, precision] / np.median(seconds) / rates[precision]:.2f}",
            )
        )
    header = (
        "",
        "precision",
        "images a CPU second" if device.type == "cpu" else "images/s",
        "speed, torchvision in fp32 = 1",
        "torchvision in the same precision = 1",
        "GFLOP an image",
        "part of the matrix rate",
    )
    measured = ", ".join(f"{rate / 1e12:.2f} TFLOP/s {name}" for name, rate in rates.items())
    print_table(f"{title} on {device.type}, batch {args.batch_size}", header, rows)
    print(f"Matrix rate: {measured}.\n")
