#!/usr/bin/env python3
"""Input pipeline of m2det on real images: images a second on one core.

Ours against its own parts and against the original's way (see m2det/reference.py). The
original changes colours and normalises in the worker, ours on the device: the row that adds our
device's part to the worker's shows what both together cost a CPU. The recipe draws one of five
interpolations for each image; rows show what a sample costs by each alone.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import cv2
import torch
from torch.utils.data import default_collate

from benchmarks.m2det.reference import ReferenceSet
from benchmarks.timing import print_speeds, race
from common.coco.images import read_image
from m2det.augment import augment
from m2det.config import RECIPES
from m2det.data import TrainingSet, find_files, read_records

AIM = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--recipe", default="512_vgg", choices=RECIPES)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    recipe = RECIPES[args.recipe]
    records = read_records(find_files(args.data, "train"))
    ours, images = TrainingSet(records, recipe, seed=0), range(len(records))
    reference = ReferenceSet(records, ours.truth, recipe)
    epoch = iter(range(10**9))  # a round draws anew

    def samples(dataset: TrainingSet = ours) -> list:
        number = next(epoch)
        return [dataset[number, k, k] for k in images]

    def by_one_method(method: str) -> Callable[[], list]:
        dataset = TrainingSet(records, replace(recipe, interpolations=(method,)), seed=0)
        return lambda: samples(dataset)

    def batches() -> None:
        number, size = next(epoch), recipe.batch_size
        for start in range(0, len(records), size):
            default_collate([ours[number, k, k] for k in images[start : start + size]])

    def with_device() -> None:
        augment(default_collate(samples()), recipe)

    def decode() -> None:
        for k in images:
            read_image(records.path(k))

    def original() -> None:
        for k in images:
            reference[k]

    peers = {
        "ours: a sample": samples,
        f"ours: a sample, collated into batches of {recipe.batch_size}": batches,
        "part of ours: read and decode": decode,
        **{f"ours: a sample, always {m}": by_one_method(m) for m in recipe.interpolations},
        "ours and the device's part (colour, normalise)": with_device,
        "original, re-implemented: all of it in the worker": original,
    }
    times = race(peers, args.rounds)
    title = f"Input pipeline, {len(images)} images, aim {AIM} images/s a core"
    print_speeds(title, times, len(images), "ours: a sample", "ours: a sample")


if __name__ == "__main__":
    main()
