#!/usr/bin/env python3
"""Decoding and NMS of ssd_mmdet on one core, against the original's way.

The outputs are those of the golden files (tests/golden/ssd_mmdet/README.md): `sparse`, which
resembles a trained network's, and `dense`, with 116,000 candidates. Both peers are first checked to
give the same detections.
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

from benchmarks.ssd_mmdet.reference import reference_detect
from benchmarks.timing import print_table, race, ratio
from ssd_mmdet.config import RECIPES, Recipe
from ssd_mmdet.postprocess import detect

SEEDS = {"sparse": 3, "dense": 4}  # those of the golden files
ANCHORS = 8732
CLASSES = 80
HEIGHT = 427  # of the original image, pixels
WIDTH = 640

HEADER = (
    "outputs",
    "ours: CPU ms an image",
    "original, re-implemented: CPU ms an image",
    "time, original = 1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe = RECIPES["1p"]
    rows = [measure(case, raw_outputs(case), recipe, args.rounds) for case in SEEDS]
    print_table("Decoding and NMS", HEADER, rows)


def measure(
    case: str, outputs: tuple[Tensor, Tensor], recipe: Recipe, rounds: int
) -> tuple[str, ...]:
    """Return a row of the table: how long both peers take, after a check that they agree."""
    sizes = torch.tensor([[HEIGHT, WIDTH]])
    scale = recipe.image_size / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return detect(outputs, sizes, recipe)[0]

    def original() -> tuple[Tensor, Tensor, Tensor]:
        return reference_detect(outputs, scale, recipe)

    for ours_value, original_value in zip(ours(), original(), strict=True):
        torch.testing.assert_close(ours_value, original_value, rtol=0, atol=1e-3)
    times = race({"ours": ours, "original": original}, rounds)
    ours_seconds = times["ours"].cpu
    original_seconds = times["original"].cpu
    return (
        case,
        f"{1e3 * np.median(ours_seconds):.1f}",
        f"{1e3 * np.median(original_seconds):.1f}",
        f"{ratio(ours_seconds, original_seconds):.3f}",
    )


def raw_outputs(case: str) -> tuple[Tensor, Tensor]:
    """Return deltas (1, P, 4) and logits (1, P, 81) of a case in SEEDS."""
    rng = np.random.default_rng(SEEDS[case])
    logits = rng.standard_normal((1, ANCHORS, CLASSES + 1)).astype(np.float32)
    if case == "sparse":
        logits[..., -1] += 8  # the background
        anchors = rng.choice(ANCHORS - 32, 60, replace=False)
        labels = rng.integers(0, CLASSES, 60)
        rises = rng.uniform(6, 12, 60).astype(np.float32)
        for anchor, label, rise in zip(anchors, labels, rises, strict=True):
            logits[0, anchor : anchor + 6, label] += rise
    deltas = rng.standard_normal((1, ANCHORS, 4)).astype(np.float32)
    deltas[0, :50, 2:] *= 30
    return torch.from_numpy(deltas), torch.from_numpy(logits)


if __name__ == "__main__":
    main()
