#!/usr/bin/env python3
"""Targets, loss and backward pass of fcos at 800 x 1344 on one core, against the original's way.

Both peers begin with the raw outputs. They are first checked to give the same loss and gradients.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.fcos.reference import ReferenceLoss
from benchmarks.timing import print_table, race, ratio
from fcos.anchors import map_sizes
from fcos.config import RECIPES, Recipe
from fcos.loss import DetectionLoss
from fcos.model import Outputs

CLASSES = 80
MAX_BOXES = 32
HEIGHT = 800
WIDTH = 1344

HEADER = (
    "boxes an image",
    "",
    "ours: CPU ms an image",
    "original, re-implemented: CPU ms an image",
    "time, original = 1",
)

# Runs targets and loss, and returns the loss, with the gradients of the outputs if asked for.
Peer = Callable[[bool], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for num_boxes in (MAX_BOXES, 8):
        ours, original = make_peers(args.batch_size, num_boxes)
        require_equal(ours, original)
        for backward in (False, True):
            times = race(
                {
                    "ours": functools.partial(ours, backward),
                    "original": functools.partial(original, backward),
                },
                args.rounds,
            )
            ours_ms = 1e3 * times["ours"].cpu / args.batch_size
            original_ms = 1e3 * times["original"].cpu / args.batch_size
            rows.append(
                (
                    num_boxes,
                    "forward and backward" if backward else "forward",
                    f"{np.median(ours_ms):.1f}",
                    f"{np.median(original_ms):.1f}",
                    f"{ratio(ours_ms, original_ms):.2f}",
                )
            )
    print_table(f"Targets and loss, batch {args.batch_size}, M = {MAX_BOXES}", HEADER, rows)


def make_peers(batch_size: int, num_boxes: int) -> tuple[Peer, Peer]:
    """Return ours and the original, on the same outputs and `num_boxes` boxes in each image."""
    recipe = RECIPES["gn"]
    rng = torch.Generator().manual_seed(0)
    gt_boxes = random_boxes(batch_size, rng)
    labels = torch.randint(CLASSES, (batch_size, MAX_BOXES), generator=rng)
    valid = (torch.arange(MAX_BOXES) < num_boxes).expand(batch_size, MAX_BOXES)
    outputs = random_outputs(recipe, batch_size, -4.6, rng)
    leaves = []
    for maps in outputs:
        for level in maps:
            leaves.append(level.requires_grad_())
    criterion = DetectionLoss(recipe, CLASSES)
    reference = ReferenceLoss(recipe, CLASSES)

    def result(loss: Tensor, backward: bool) -> tuple[Tensor, ...]:
        if not backward:
            return (loss.detach(),)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def ours(backward: bool) -> tuple[Tensor, ...]:
        losses = criterion(outputs, gt_boxes, labels, valid)
        return result(losses["loss"], backward)

    def original(backward: bool) -> tuple[Tensor, ...]:
        loss = reference(outputs, list(gt_boxes[:, :num_boxes]), list(labels[:, :num_boxes]))
        return result(loss, backward)

    return ours, original


def require_equal(ours: Peer, original: Peer) -> None:
    """Raise AssertionError unless both give the same loss and gradients."""
    for ours_value, original_value in zip(ours(True), original(True), strict=True):
        torch.testing.assert_close(ours_value, original_value, rtol=1e-3, atol=1e-6)


def random_boxes(num_images: int, rng: torch.Generator) -> Tensor:
    """Return boxes (N, M, 4) xyxy in pixels, with sides of 2 to 30 % of the image's."""
    top_left = 0.7 * torch.rand(num_images, MAX_BOXES, 2, generator=rng)
    sides = 0.02 + 0.28 * torch.rand(num_images, MAX_BOXES, 2, generator=rng)
    normalised = torch.cat([top_left, top_left + sides], dim=-1)
    return normalised * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])


def random_outputs(
    recipe: Recipe, num_images: int, mean_logit: float, rng: torch.Generator
) -> Outputs:
    """Return raw outputs for an 800 x 1344 input, with distances around the stride of the level."""
    logits = []
    distances = []
    centerness = []
    sizes = map_sizes(recipe, HEIGHT, WIDTH)
    for stride, size in zip(recipe.strides, sizes, strict=True):
        noise = torch.randn(num_images, CLASSES + 5, *size, generator=rng)
        logits.append((mean_logit + 1.5 * noise[:, :CLASSES]).contiguous())
        distances.append(stride * (1 + 0.5 * noise[:, CLASSES:-1]).exp())
        centerness.append(1.5 * noise[:, -1:])
    return Outputs(tuple(logits), tuple(distances), tuple(centerness))


if __name__ == "__main__":
    main()
