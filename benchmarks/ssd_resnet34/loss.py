#!/usr/bin/env python3
"""Matching, loss and backward pass of ssd_resnet34 on one core, against the original's way.

The original's time is that of encoding the boxes of every image, which its workers do, and of the
loss and its backward pass. Both peers are first checked to give the same loss and gradients.
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

from benchmarks.ssd_resnet34.reference import Encoder, ReferenceLoss
from benchmarks.timing import print_table, race, ratio
from ssd_resnet34.config import RECIPES
from ssd_resnet34.loss import DetectionLoss

CLASSES = 80
MAX_BOXES = 32

HEADER = (
    "real boxes an image",
    "ours: CPU ms an image",
    "original, re-implemented: CPU ms an image",
    "time, original = 1",
)

# Runs matching, loss and backward pass, and returns the loss and the gradients of the outputs.
Peer = Callable[[], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for num_boxes in (MAX_BOXES, 8):
        ours, original = make_peers(args.batch_size, num_boxes)
        require_equal(ours, original)
        times = race({"ours": ours, "original": original}, args.rounds)
        ours_ms = 1e3 * times["ours"].cpu / args.batch_size
        original_ms = 1e3 * times["original"].cpu / args.batch_size
        rows.append(
            (
                num_boxes,
                f"{np.median(ours_ms):.2f}",
                f"{np.median(original_ms):.2f}",
                f"{ratio(ours_ms, original_ms):.2f}",
            )
        )
    title = f"Loss with matching and backward, batch {args.batch_size}, M = {MAX_BOXES}"
    print_table(title, HEADER, rows)


def make_peers(batch_size: int, num_boxes: int) -> tuple[Peer, Peer]:
    """Return ours and the original, on the same outputs and `num_boxes` boxes in each image."""
    recipe = RECIPES["1p"]
    rng = torch.Generator().manual_seed(0)
    boxes = random_boxes(batch_size, rng)
    labels = torch.randint(CLASSES, (batch_size, MAX_BOXES), generator=rng)
    valid = (torch.arange(MAX_BOXES) < num_boxes).expand(batch_size, MAX_BOXES)
    criterion = DetectionLoss(recipe, CLASSES)
    encoder = Encoder(recipe)
    reference_loss = ReferenceLoss(recipe)
    num_anchors = len(encoder.anchors)
    deltas = torch.randn(batch_size, 4, num_anchors, generator=rng)
    logits = torch.randn(batch_size, 1 + CLASSES, num_anchors, generator=rng)
    outputs = (deltas.requires_grad_(), logits.requires_grad_())

    def ours() -> tuple[Tensor, ...]:
        loss = criterion(outputs, boxes, labels, valid)["loss"]
        return loss.detach(), *torch.autograd.grad(loss, outputs)

    def original() -> tuple[Tensor, ...]:
        dense_boxes = []
        dense_labels = []
        for image in range(batch_size):
            real_boxes = boxes[image, :num_boxes]
            real_labels = labels[image, :num_boxes] + 1
            encoded_boxes, encoded_labels = encoder(real_boxes, real_labels)
            dense_boxes.append(encoded_boxes)
            dense_labels.append(encoded_labels)
        loss = reference_loss(outputs, torch.stack(dense_boxes), torch.stack(dense_labels))
        return loss.detach(), *torch.autograd.grad(loss, outputs)

    return ours, original


def require_equal(ours: Peer, original: Peer) -> None:
    """Raise AssertionError unless both give the same loss and gradients."""
    for ours_value, original_value in zip(ours(), original(), strict=True):
        torch.testing.assert_close(ours_value, original_value, rtol=1e-4, atol=1e-6)


def random_boxes(num_images: int, rng: torch.Generator) -> Tensor:
    """Return boxes (N, M, 4) normalised xyxy, with sides of 0.02 to 0.3."""
    top_left = 0.7 * torch.rand(num_images, MAX_BOXES, 2, generator=rng)
    sides = 0.02 + 0.28 * torch.rand(num_images, MAX_BOXES, 2, generator=rng)
    return torch.cat([top_left, top_left + sides], dim=-1)


if __name__ == "__main__":
    main()
