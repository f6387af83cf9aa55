#!/usr/bin/env python3
"""Decoding and NMS of ssd_mmdet on one core, against the original's way.

Inputs are those of the golden files (tests/golden/ssd_mmdet/README.md): `sparse`, which is like a
trained network's, and `dense`, with 116,000 candidates. Both peers are first checked to give the
same detections.
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
from ssd_mmdet.config import RECIPES
from ssd_mmdet.postprocess import detect

AIMS = {"sparse": "5 ms", "dense": "a fifth of the original"}
ANCHORS, CHANNELS, BACKGROUND = 8732, 81, 80
HEIGHT, WIDTH = 427, 640  # of the original image, pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe, sizes = RECIPES["1p"], torch.tensor([[HEIGHT, WIDTH]])
    scale = recipe.image_size / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    rows = []
    for case, aim in AIMS.items():
        outputs = raw_outputs(case)

        def ours(outputs=outputs):
            return detect(outputs, sizes, recipe)[0]

        def original(outputs=outputs):
            return reference_detect(outputs, scale, recipe)

        for mine, theirs in zip(ours(), original(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)
        times = race({"ours": ours, "original": original}, args.rounds)
        own, peer = (times[name].cpu for name in ("ours", "original"))
        medians = (f"{1e3 * np.median(cpu):.1f}" for cpu in (own, peer))
        rows.append((case, *medians, f"{ratio(own, peer):.3f}", aim))
    header = (
        "outputs",
        "ours: CPU ms an image",
        "original, re-implemented: CPU ms an image",
        "ours / original",
        "aim: at most",
    )
    print_table("Decoding and NMS", header, rows)


def raw_outputs(case: str) -> tuple[Tensor, Tensor]:
    """Offsets (1, P, 4) and logits (1, P, 81)."""
    draws = np.random.default_rng({"sparse": 3, "dense": 4}[case])
    logits = draws.standard_normal((1, ANCHORS, CHANNELS)).astype(np.float32)
    if case == "sparse":
        logits[..., BACKGROUND] += 8
        hot = draws.choice(ANCHORS - 32, 60, replace=False)
        labels = draws.integers(0, BACKGROUND, 60)
        rise = draws.uniform(6, 12, 60).astype(np.float32)
        for place, label, value in zip(hot, labels, rise, strict=True):
            logits[0, place : place + 6, label] += value
    offsets = draws.standard_normal((1, ANCHORS, 4)).astype(np.float32)
    offsets[0, :50, 2:] *= 30
    return torch.from_numpy(offsets), torch.from_numpy(logits)


if __name__ == "__main__":
    main()
