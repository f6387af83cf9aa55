#!/usr/bin/env python3
"""Matching, loss and backward pass of m2det at 512 x 512 on one core, against the original's way.

Both peers are first checked to give the same loss and gradients.
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

from benchmarks.m2det.reference import ReferenceLoss
from benchmarks.timing import print_table, race, ratio
from m2det.config import RECIPES
from m2det.loss import DetectionLoss

CLASSES = 80
MAX_BOXES = 32

HEADER = (
    "boxes an image",
    "",
    "ours: CPU ms an image",
    "original, re-implemented: CPU ms an image",
    "time, original = 1",
)

# Runs matching and loss, and returns the loss, with the gradients of the outputs if asked for.
Peer = Callable[[bool], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
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
    print_table(f"Matching and loss, batch {args.batch_size}, M = {MAX_BOXES}", HEADER, rows)


def make_peers(batch_size: int, num_boxes: int) -> tuple[Peer, Peer]:
    """Return ours and the original, on the same outputs and `num_boxes` boxes in each image."""
    recipe = RECIPES["512_vgg"]
    rng = torch.Generator().manual_seed(0)
    gt_boxes = random_boxes(batch_size, rng)
    labels = torch.randint(CLASSES, (batch_size, MAX_BOXES), generator=rng)
    valid = (torch.arange(MAX_BOXES) < num_boxes).expand(batch_size, MAX_BOXES)
    criterion = DetectionLoss(recipe, CLASSES)
    reference = ReferenceLoss(recipe, CLASSES)
    num_anchors = len(criterion.anchors)
    deltas = torch.randn(batch_size, num_anchors, 4, generator=rng).requires_grad_()
    logits = torch.randn(batch_size, num_anchors, 1 + CLASSES, generator=rng).requires_grad_()
    outputs = (deltas, logits)

    def result(loss: Tensor, backward: bool) -> tuple[Tensor, ...]:
        if not backward:
            return (loss.detach(),)
        return loss.detach(), *torch.autograd.grad(loss, outputs)

    def ours(backward: bool) -> tuple[Tensor, ...]:
        losses = criterion(outputs, gt_boxes, labels, valid)
        return result(losses["loss"], backward)

    def original(backward: bool) -> tuple[Tensor, ...]:
        loss = reference(outputs, list(gt_boxes[:, :num_boxes]), list(labels[:, :num_boxes] + 1))
        return result(loss, backward)

    return ours, original


def require_equal(ours: Peer, original: Peer) -> None:
    """Raise AssertionError unless both give the same loss and gradients."""
    for ours_value, original_value in zip(ours(True), original(True), strict=True):
        torch.testing.assert_close(ours_value, original_value, rtol=1e-4, atol=1e-6)


def random_boxes(num_images: int, rng: torch.Generator) -> Tensor:
    """Return normalised boxes (N, M, 4) xyxy with sides of 2 to 30 % of the image's."""
    top_left = 0.7 * torch.rand(num_images, MAX_BOXES, 2, generator=rng)
    sides = 0.02 + 0.28 * torch.rand(num_images, MAX_BOXES, 2, generator=rng)
    return torch.cat([top_left, top_left + sides], dim=-1)


if __name__ == "__main__":
    main()
