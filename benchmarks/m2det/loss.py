#!/usr/bin/env python3
"""Matching, loss and backward pass of m2det at 512 x 512 on one core, against the original's way.

Both peers are first checked to give the same loss and gradients.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

import numpy as np
import torch
from torch import Tensor

from benchmarks.m2det.reference import ReferenceLoss
from benchmarks.timing import print_table, race, ratio
from m2det.config import RECIPES
from m2det.loss import DetectionLoss

AIM, CLASSES, SLOTS = "at most 0.5, better 0.33", 80, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for real in (SLOTS, 8):
        ours, original = peers(args.batch_size, real)
        for mine, theirs in zip(ours(True), original(True), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        for backward in (False, True):
            pair = {
                "ours": lambda run=ours, b=backward: run(b),
                "original": lambda run=original, b=backward: run(b),
            }
            times = race(pair, args.rounds)
            cpu = {name: timing.cpu / args.batch_size * 1e3 for name, timing in times.items()}
            medians = (f"{np.median(cpu[name]):.1f}" for name in ("ours", "original"))
            passes = "forward and backward" if backward else "forward"
            rows.append((real, passes, *medians, f"{ratio(cpu['ours'], cpu['original']):.2f}"))
    header = (
        "real boxes an image",
        "",
        "ours: CPU ms an image",
        "original, re-implemented: CPU ms an image",
        "ours / original",
    )
    title = f"Loss with matching, batch {args.batch_size}, M = {SLOTS}, aim {AIM}"
    print_table(title, header, rows)


def peers(batch_size: int, real: int):
    """Two functions of the same outputs and ground truth that return loss and, if asked for,
    gradients."""
    recipe = RECIPES["512_vgg"]
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    low = 0.7 * uniform(batch_size, SLOTS, 2)
    boxes = torch.cat([low, low + 0.02 + 0.28 * uniform(batch_size, SLOTS, 2)], dim=-1)
    labels = torch.randint(CLASSES, (batch_size, SLOTS), generator=generator)
    valid = (torch.arange(SLOTS) < real).expand(batch_size, SLOTS)
    criterion, reference = DetectionLoss(recipe, CLASSES), ReferenceLoss(recipe, CLASSES)
    anchors = len(criterion.anchors)
    outputs = tuple(
        torch.randn(batch_size, anchors, channels, generator=generator).requires_grad_()
        for channels in (4, CLASSES + 1)
    )

    def gradients(loss: Tensor, backward: bool) -> tuple[Tensor, ...]:
        return loss.detach(), *(torch.autograd.grad(loss, outputs) if backward else ())

    def ours(backward: bool) -> tuple[Tensor, ...]:
        return gradients(criterion(outputs, boxes, labels, valid)["loss"], backward)

    def original(backward: bool) -> tuple[Tensor, ...]:
        loss = reference(outputs, list(boxes[:, :real]), list(labels[:, :real] + 1))
        return gradients(loss, backward)

    return ours, original


if __name__ == "__main__":
    main()
