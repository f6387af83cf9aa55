#!/usr/bin/env python3
"""Decoding and soft-NMS of m2det at 512 x 512 on one core, against the original's way.

The outputs `realistic` are those of the golden files (tests/golden/m2det/README.md), like a trained
network's; `N(0,3)` are plain noise, with 74,000 candidates. The original's soft-NMS is compiled
code, and so is its peer here (soft_nms.c). Both peers are first checked to give the same
detections.
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

from benchmarks.m2det.reference import reference_detect
from benchmarks.timing import print_table, race, ratio
from common.coco.detections import Detections
from m2det.config import RECIPES, Recipe
from m2det.postprocess import detect

CASES = ("realistic", "N(0,3)")
ANCHORS = 32760
CHANNELS = 81
HEIGHT = 480  # of the original image, pixels
WIDTH = 640

HEADER = (
    "outputs",
    "ours: CPU ms an image",
    "original, re-implemented: CPU ms an image",
    "time, original = 1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe = RECIPES["512_vgg"]
    rows = [measure(case, random_outputs(case), recipe, args.rounds) for case in CASES]
    print_table("Decoding and soft-NMS, one image", HEADER, rows)


def measure(
    case: str, outputs: tuple[Tensor, Tensor], recipe: Recipe, rounds: int
) -> tuple[str, ...]:
    """Return a row of the table: how long both peers take, after a check that they agree."""
    sizes = torch.tensor([[HEIGHT, WIDTH]])

    def ours() -> Detections:
        return detect(outputs, sizes, recipe)[0]

    def original() -> Detections:
        return reference_detect(outputs, (HEIGHT, WIDTH), recipe)

    require_equal(ours(), original())
    times = race({"ours": ours, "original": original}, rounds)
    ours_seconds = times["ours"].cpu
    original_seconds = times["original"].cpu
    return (
        case,
        f"{1e3 * np.median(ours_seconds):.1f}",
        f"{1e3 * np.median(original_seconds):.1f}",
        f"{ratio(ours_seconds, original_seconds):.2f}",
    )


def random_outputs(case: str) -> tuple[Tensor, Tensor]:
    """Return deltas (1, P, 4) and logits (1, P, 81)."""
    rng = np.random.default_rng(8)
    deltas = (0.5 * rng.standard_normal((1, ANCHORS, 4))).astype(np.float32)
    logits = rng.standard_normal((1, ANCHORS, CHANNELS)).astype(np.float32)
    if case == "realistic":
        logits[..., 0] += 8
        centers = rng.integers(64, ANCHORS - 64, 24)
        channels = rng.integers(1, 13, 24)
        for center, channel in zip(centers, channels, strict=True):
            logits[0, center - 60 : center + 60, channel] += 9
    else:
        logits *= 3
    return torch.from_numpy(deltas), torch.from_numpy(logits)


def require_equal(ours: Detections, original: Detections) -> None:
    """Raise AssertionError unless both have the same scores and the same best box of each class.

    The last one of a class that is cut at 50 may differ where scores are equal but for rounding.
    """
    original_scores = original.scores.sort(descending=True).values
    torch.testing.assert_close(ours.scores, original_scores, rtol=0, atol=1e-4)
    corner = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    for label in original.labels.unique():
        ours_best = ours.boxes[ours.labels == label][0]
        original_best = original.boxes[original.labels == label][0]
        original_best = torch.minimum(original_best.clamp(min=0), corner)
        torch.testing.assert_close(ours_best, original_best, rtol=0, atol=1e-2)


if __name__ == "__main__":
    main()
