#!/usr/bin/env python3
"""Post-processing of fcos at 800 x 1344 on one core, against the original's way.

Random outputs as those of the golden files (tests/golden/fcos/README.md), in the size of a real
input: `typical`, and `many` with more than 10,000 candidates. Both peers are first checked to give
the same detections.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

import numpy as np
import torch

from benchmarks.fcos.loss import random_outputs
from benchmarks.fcos.reference import reference_detect
from benchmarks.timing import print_table, race, ratio
from fcos.config import RECIPES
from fcos.postprocess import detect_in

MEANS = {"typical": -6.0, "many": -3.5}  # of the class logits
SIZE, FACTOR = (800, 1333), 2.0  # of the image in the input; its size is that over the factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe, rows = RECIPES["gn"], []
    sizes, factors = torch.tensor([SIZE]), torch.full((1, 2), FACTOR)
    for case, mean in MEANS.items():
        outputs = random_outputs(recipe, 1, mean, torch.Generator().manual_seed(0))

        def ours(outputs=outputs):
            return detect_in(outputs, sizes, factors, recipe)[0]

        def original(outputs=outputs):
            return reference_detect(outputs, SIZE, torch.full((4,), FACTOR), recipe)

        for mine, theirs in zip(ours(), original(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)
        times = race({"ours": ours, "original": original}, args.rounds)
        own, peer = (times[name].cpu for name in ("ours", "original"))
        medians = (f"{1e3 * np.median(cpu):.1f}" for cpu in (own, peer))
        rows.append((case, *medians, f"{ratio(own, peer):.2f}"))
    header = (
        "outputs",
        "ours: CPU ms an image",
        "original, re-implemented: CPU ms an image",
        "ours / original",
    )
    print_table("Post-processing, one image", header, rows)


if __name__ == "__main__":
    main()
