#!/usr/bin/env python3
"""Decoding and soft-NMS of m2det at 512 x 512 on one core, against the original's way.

Inputs: `realistic` are those of the golden files (tests/golden/m2det/README.md), a trained
network's; `N(0,3)` are plain noise, with 74,000 candidates. The original's soft-NMS is compiled
code, and so is its peer here (soft_nms.c). Both are first checked to give the same detections.
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
from m2det.config import RECIPES
from m2det.postprocess import detect

AIMS = {"realistic": "", "N(0,3)": "0.1"}  # parts of the original's time
PRIORS, CHANNELS = 32760, 81
HEIGHT, WIDTH = 480, 640  # of the original image, pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe, sizes = RECIPES["512_vgg"], torch.tensor([[HEIGHT, WIDTH]])
    rows = []
    for case, aim in AIMS.items():
        outputs = raw_outputs(case)

        def ours(outputs=outputs):
            return detect(outputs, sizes, recipe)[0]

        def original(outputs=outputs):
            return reference_detect(outputs, (HEIGHT, WIDTH), recipe)

        check(ours(), original())
        times = race({"ours": ours, "original": original}, args.rounds)
        own, peer = (times[name].cpu for name in ("ours", "original"))
        medians = (f"{1e3 * np.median(cpu):.1f}" for cpu in (own, peer))
        rows.append((case, *medians, f"{ratio(own, peer):.2f}", aim))
    header = (
        "outputs",
        "ours: CPU ms an image",
        "original, re-implemented: CPU ms an image",
        "ours / original",
        "aim: at most",
    )
    print_table("Decoding and soft-NMS", header, rows)


def raw_outputs(case: str) -> tuple[Tensor, Tensor]:
    """Offsets (1, P, 4) and logits (1, P, 81)."""
    rng = np.random.default_rng(8)
    offsets = (0.5 * rng.standard_normal((1, PRIORS, 4))).astype(np.float32)
    logits = rng.standard_normal((1, PRIORS, CHANNELS)).astype(np.float32)
    if case == "realistic":
        logits[..., 0] += 8
        places, channels = rng.integers(64, PRIORS - 64, 24), rng.integers(1, 13, 24)
        for place, channel in zip(places, channels, strict=True):
            logits[0, place - 60 : place + 60, channel] += 9
    else:
        logits *= 3
    return torch.from_numpy(offsets), torch.from_numpy(logits)


def check(ours: tuple, original: tuple) -> None:
    """The same scores; and, by class, the same best boxes.

    The last of a class that is cut at 50 may differ where scores are equal but for rounding.
    """
    scores = original[1].sort(descending=True).values
    torch.testing.assert_close(ours[1], scores, rtol=0, atol=1e-4)
    limit = torch.tensor([WIDTH, HEIGHT] * 2)
    for label in original[2].unique():
        best = (part[0][part[2] == label][0] for part in (ours, original))
        mine, theirs = best
        theirs = torch.minimum(theirs.clamp(min=0), limit)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2)


if __name__ == "__main__":
    main()
