#!/usr/bin/env python3
"""Post-processing of fcos at 800 x 1344 on one core, against the original's way.

The outputs are random like those of the golden files (tests/golden/fcos/README.md), but of the size
of a real input: `typical`, and `many` with more than 10,000 candidates. Both peers are first
checked to give the same detections.
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

from benchmarks.fcos.loss import random_outputs
from benchmarks.fcos.reference import reference_detect
from benchmarks.timing import print_table, race, ratio
from fcos.config import RECIPES, Recipe
from fcos.model import Outputs
from fcos.postprocess import detect_resized

MEAN_LOGITS = {"typical": -6.0, "many": -3.5}
SIZE = (800, 1333)  # height and width of the image in the network input
FACTOR = 2.0  # that size over the one of the original image

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

    recipe = RECIPES["gn"]
    rows = []
    for case, mean_logit in MEAN_LOGITS.items():
        rng = torch.Generator().manual_seed(0)
        outputs = random_outputs(recipe, 1, mean_logit, rng)
        rows.append(measure(case, outputs, recipe, args.rounds))
    print_table("Post-processing, one image", HEADER, rows)


def measure(case: str, outputs: Outputs, recipe: Recipe, rounds: int) -> tuple[str, ...]:
    """Return a row of the table: how long both peers take, after a check that they agree."""
    sizes = torch.tensor([SIZE])
    factors = torch.full((1, 2), FACTOR)
    box_factors = torch.full((4,), FACTOR)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return detect_resized(outputs, sizes, factors, recipe)[0]

    def original() -> tuple[Tensor, Tensor, Tensor]:
        return reference_detect(outputs, SIZE, box_factors, recipe)

    for ours_value, original_value in zip(ours(), original(), strict=True):
        torch.testing.assert_close(ours_value, original_value, rtol=0, atol=1e-3)
    times = race({"ours": ours, "original": original}, rounds)
    ours_seconds = times["ours"].cpu
    original_seconds = times["original"].cpu
    return (
        case,
        f"{1e3 * np.median(ours_seconds):.1f}",
        f"{1e3 * np.median(original_seconds):.1f}",
        f"{ratio(ours_seconds, original_seconds):.2f}",
    )


if __name__ == "__main__":
    main()
