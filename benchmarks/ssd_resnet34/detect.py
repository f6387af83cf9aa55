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
from benchmarks.timing import print_table, race, ratio
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.postprocess import detect

IMAGES = 2
CHANNELS = 81  # background and 80 classes
ANCHORS = 8732
CLUSTERS = 60  # in each image
CLUSTER_SIZE = 5  # neighbouring anchors

HEADER = (
    "outputs",
    "ours: CPU ms an image",
    "original, re-implemented: CPU ms an image",
    "time, original = 1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)  # the original takes seconds
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe = RECIPES["1p"]
    rows = [
        measure("random", random_outputs(), recipe, args.rounds),
        measure("clustered", clustered_outputs(), recipe, args.rounds),
    ]
    print_table("Decoding and NMS", HEADER, rows)


def measure(
    case: str, outputs: tuple[Tensor, Tensor], recipe: Recipe, rounds: int
) -> tuple[str, ...]:
    """Return a row of the table: how long both peers take, after a check that they agree."""
    sizes = torch.ones(IMAGES, 2, dtype=torch.int64)  # boxes stay normalised

    def ours() -> list:
        return detect(outputs, sizes, recipe)

    def original() -> list:
        return reference_detect(outputs, recipe)

    require_equal(ours(), original())
    times = race({"ours": ours, "original": original}, rounds)
    ours_ms = 1e3 * times["ours"].cpu / IMAGES
    original_ms = 1e3 * times["original"].cpu / IMAGES
    return (
        case,
        f"{np.median(ours_ms):.1f}",
        f"{np.median(original_ms):.0f}",
        f"{ratio(ours_ms, original_ms):.4f}",
    )


def require_equal(ours: list, original: list) -> None:
    """Raise AssertionError unless boxes, scores and labels of all images are the same."""
    for ours_image, original_image in zip(ours, original, strict=True):
        for ours_value, original_value in zip(ours_image, original_image, strict=True):
            torch.testing.assert_close(ours_value, original_value, rtol=0, atol=1e-6)


def random_outputs() -> tuple[Tensor, Tensor]:
    """Return deltas (N, 4, P) and logits (N, C, P) of noise."""
    rng = np.random.default_rng(3)
    deltas = rng.standard_normal((IMAGES, 4, ANCHORS)).astype(np.float32)
    logits = rng.standard_normal((IMAGES, CHANNELS, ANCHORS)).astype(np.float32)
    return torch.from_numpy(deltas), torch.from_numpy(logits)


def clustered_outputs() -> tuple[Tensor, Tensor]:
    """Return deltas (N, 4, P) and logits (N, C, P) in which few neighbouring anchors score."""
    rng = np.random.default_rng(4)
    deltas = (0.5 * rng.standard_normal((IMAGES, 4, ANCHORS))).astype(np.float32)
    logits = rng.standard_normal((IMAGES, CHANNELS, ANCHORS)).astype(np.float32)
    logits[:, 0] += 6
    centers = rng.integers(2, ANCHORS - 2, (IMAGES, CLUSTERS))
    channels = rng.integers(1, CHANNELS, (IMAGES, CLUSTERS))
    rises = rng.uniform(4, 9, (IMAGES, CLUSTERS, CLUSTER_SIZE)).astype(np.float32)
    for image, cluster, step in np.ndindex(rises.shape):
        anchor = centers[image, cluster] - 2 + step
        logits[image, channels[image, cluster], anchor] += rises[image, cluster, step]
    return torch.from_numpy(deltas), torch.from_numpy(logits)


if __name__ == "__main__":
    main()
