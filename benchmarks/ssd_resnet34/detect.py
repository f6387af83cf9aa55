#!/usr/bin/env python3
"""Decoding and NMS of ssd_resnet34 on one core, against the original's way.

Inputs are those of the golden files (tests/golden/ssd_resnet34/README.md): `random`, the worst
case with every class full, and `clustered`, which is more like a trained network. Both peers are
first checked to give the same detections.
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

from benchmarks.ssd_resnet34.reference import reference_detect
from benchmarks.timing import print_table, race
from ssd_resnet34.config import RECIPES
from ssd_resnet34.postprocess import detect

AIMS = {"random": 15, "clustered": 5}  # ms an image
IMAGES, CLASSES, PRIORS = 2, 81, 8732


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--reference_rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe, sizes = RECIPES["1p"], torch.ones(IMAGES, 2, dtype=torch.long)
    rows = []
    for case, outputs in (("random", random_outputs()), ("clustered", clustered_outputs())):

        def ours(outputs=outputs):
            return detect(outputs, sizes, recipe)

        def original(outputs=outputs):
            return reference_detect(outputs, recipe)

        for mine, theirs in zip(ours(), original(), strict=True):
            for part, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(part, other, rtol=0, atol=1e-6)
        own = race({"": ours}, args.rounds)[""].cpu
        peer = race({"": original}, args.reference_rounds, warmup=0)[""].cpu
        own, peer = (1e3 * np.median(cpu) / IMAGES for cpu in (own, peer))
        rows.append((case, f"{own:.1f}", AIMS[case], f"{peer:.0f}", f"{own / peer:.4f}"))
    header = (
        "outputs",
        "ours: CPU ms an image",
        "aim, ms",
        "original, re-implemented: CPU ms an image",
        "ours / original",
    )
    print_table("Decoding and NMS", header, rows)


def random_outputs() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(3)
    return _tensors(rng.standard_normal((IMAGES, c, PRIORS)) for c in (4, CLASSES))


def clustered_outputs() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(4)
    offsets = 0.5 * rng.standard_normal((IMAGES, 4, PRIORS))
    logits = rng.standard_normal((IMAGES, CLASSES, PRIORS)).astype(np.float32)
    logits[:, 0] += 6
    prior = rng.integers(2, PRIORS - 2, (IMAGES, 60))
    label = rng.integers(1, CLASSES, (IMAGES, 60))
    rise = rng.uniform(4, 9, (IMAGES, 60, 5)).astype(np.float32)
    for image, spot, step in np.ndindex(rise.shape):
        place = prior[image, spot] - 2 + step
        logits[image, label[image, spot], place] += rise[image, spot, step]
    return _tensors((offsets, logits))


def _tensors(arrays) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array.astype(np.float32)) for array in arrays)


if __name__ == "__main__":
    main()
