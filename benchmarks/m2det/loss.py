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
    "ours / original",
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
    for boxes in (MAX_BOXES, 8):
        ours, original = make_peers(args.batch_size, boxes)
        require_equal(ours, original)
        for backward in (False, True):
            times = race(
                {
                    "ours": lambda run=ours, backward=backward: run(backward),
                    "original": lambda run=original, backward=backward: run(backward),
                },
                args.rounds,
            )
            ours_ms = 1e3 * times["ours"].cpu / args.batch_size
            original_ms = 1e3 * times["original"].cpu / args.batch_size
            rows.append(
                (
                    boxes,
                    "forward and backward" if backward else "forward",
                    f"{np.median(ours_ms):.1f}",
                    f"{np.median(original_ms):.1f}",
                    f"{ratio(ours_ms, original_ms):.2f}",
                )
            )
    print_table(f"Matching and loss, batch {args.batch_size}, M = {MAX_BOXES}", HEADER, rows)


def make_peers(batch_size: int, boxes: int) -> tuple[Peer, Peer]:
    """Return ours and the original, on the same outputs and `boxes` boxes in each image."""
    recipe = RECIPES["512_vgg"]
    generator = torch.Generator().manual_seed(0)
    gt_boxes = random_boxes(batch_size, generator)
    labels = torch.randint(CLASSES, (batch_size, MAX_BOXES), generator=generator)
    valid = (torch.arange(MAX_BOXES) < boxes).expand(batch_size, MAX_BOXES)
    criterion = DetectionLoss(recipe, CLASSES)
    reference = ReferenceLoss(recipe, CLASSES)
    anchors = len(criterion.anchors)
    deltas = torch.randn(batch_size, anchors, 4, generator=generator).requires_grad_()
    logits = torch.randn(batch_size, anchors, 1 + CLASSES, generator=generator).requires_grad_()
    outputs = (deltas, logits)

    def result(loss: Tensor, backward: bool) -> tuple[Tensor, ...]:
        if not backward:
            return (loss.detach(),)
        return loss.detach(), *torch.autograd.grad(loss, outputs)

    def ours(backward: bool) -> tuple[Tensor, ...]:
        losses = criterion(outputs, gt_boxes, labels, valid)
        return result(losses["loss"], backward)

    def original(backward: bool) -> tuple[Tensor, ...]:
        loss = reference(outputs, list(gt_boxes[:, :boxes]), list(labels[:, :boxes] + 1))
        return result(loss, backward)

    return ours, original


def require_equal(ours: Peer, original: Peer) -> None:
    """Raise AssertionError unless both give the same loss and gradients."""
    for ours_value, original_value in zip(ours(True), original(True), strict=True):
        torch.testing.assert_close(ours_value, original_value, rtol=1e-4, atol=1e-6)


def random_boxes(images: int, generator: torch.Generator) -> Tensor:
    """Return normalised boxes (images, M, 4) xyxy with sides of 2 to 30 % of the image's."""
    top_left = 0.7 * torch.rand(images, MAX_BOXES, 2, generator=generator)
    sides = 0.02 + 0.28 * torch.rand(images, MAX_BOXES, 2, generator=generator)
    return torch.cat([top_left, top_left + sides], dim=-1)


if __name__ == "__main__":
    main()
