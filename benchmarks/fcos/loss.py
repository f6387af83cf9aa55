#!/usr/bin/env python3
"""Targets, loss and backward pass of fcos at 800 x 1344 on one core, against the original's way.

Both peers begin with the raw maps, and are first checked to give the same loss and gradients.
Ours makes the focal loss's gradient in the forward pass.
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

from benchmarks.fcos.reference import ReferenceLoss
from benchmarks.timing import print_table, race, ratio
from fcos.anchors import map_sizes
from fcos.config import RECIPES, Recipe
from fcos.loss import DetectionLoss
from fcos.model import Outputs

AIM, CLASSES, SLOTS = "at most 0.5, better 0.33", 80, 32
HEIGHT, WIDTH = 800, 1344


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for real in (SLOTS, 8):
        ours, original = peers(args.batch_size, real)
        for mine, theirs in zip(ours(True), original(True), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
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
    print_table(f"Targets and loss, batch {args.batch_size}, M = {SLOTS}, aim {AIM}", header, rows)


def peers(batch_size: int, real: int):
    """Two functions of the same outputs and ground truth that return loss and, if asked for,
    gradients."""
    recipe = RECIPES["gn"]
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    low = 0.7 * uniform(batch_size, SLOTS, 2)
    boxes = torch.cat([low, low + 0.02 + 0.28 * uniform(batch_size, SLOTS, 2)], dim=-1)
    boxes = boxes * torch.tensor([WIDTH, HEIGHT] * 2)
    labels = torch.randint(CLASSES, (batch_size, SLOTS), generator=generator)
    valid = (torch.arange(SLOTS) < real).expand(batch_size, SLOTS)
    criterion, reference = DetectionLoss(recipe, CLASSES), ReferenceLoss(recipe, CLASSES)
    outputs = random_outputs(recipe, batch_size, -4.6, generator)
    leaves = [x.requires_grad_() for maps in outputs for x in maps]

    def gradients(loss: Tensor, backward: bool) -> tuple[Tensor, ...]:
        return loss.detach(), *(torch.autograd.grad(loss, leaves) if backward else ())

    def ours(backward: bool) -> tuple[Tensor, ...]:
        return gradients(criterion(outputs, boxes, labels, valid)["loss"], backward)

    def original(backward: bool) -> tuple[Tensor, ...]:
        loss = reference(outputs, list(boxes[:, :real]), list(labels[:, :real]))
        return gradients(loss, backward)

    return ours, original


def random_outputs(recipe: Recipe, images: int, mean: float, generator) -> Outputs:
    """Maps of an 800 x 1344 input: logits around `mean`, distances around the stride."""
    logits, distances, centerness = [], [], []
    sizes = map_sizes(recipe, HEIGHT, WIDTH)
    for stride, size in zip(recipe.strides, sizes, strict=True):
        noise = torch.randn(images, CLASSES + 5, *size, generator=generator)
        logits.append((mean + 1.5 * noise[:, :CLASSES]).contiguous())
        distances.append(stride * (1 + 0.5 * noise[:, CLASSES:-1]).exp())
        centerness.append(1.5 * noise[:, -1:])
    return Outputs(tuple(logits), tuple(distances), tuple(centerness))


if __name__ == "__main__":
    main()
