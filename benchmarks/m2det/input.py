#!/usr/bin/env python3
"""Input pipeline of m2det on real images: images a second on one core.

Ours is compared with its own steps and with the original's way (see m2det/reference.py). The
original changes colours and normalises in the worker, ours on the device. So there is a row that
adds our device's work to the worker's, which shows what both together cost a CPU. The recipe draws
one of five interpolations for each image; further rows show what a sample costs by each alone.
"""

import argparse
import itertools
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
from m2det.data import Batch, TrainingSet, find_files, read_records


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
    num_images = len(records)
    ours = TrainingSet(records, recipe, seed=0)
    reference = ReferenceSet(records, ours.ground_truth, recipe)
    epochs = itertools.count()  # each round draws other numbers

    def make_samples(dataset: TrainingSet = ours) -> list[Batch]:
        epoch = next(epochs)
        return [dataset[epoch, record, record] for record in range(num_images)]

    def by_one_method(interpolation: str) -> Callable[[], list[Batch]]:
        one_method = replace(recipe, interpolations=(interpolation,))
        dataset = TrainingSet(records, one_method, seed=0)
        return lambda: make_samples(dataset)

    def make_batches() -> None:
        epoch = next(epochs)
        for first in range(0, num_images, recipe.batch_size):
            end = min(first + recipe.batch_size, num_images)
            default_collate([ours[epoch, record, record] for record in range(first, end)])

    def make_inputs() -> None:
        augment(default_collate(make_samples()), recipe)

    def decode() -> None:
        for record in range(num_images):
            read_image(records.path(record))

    def original_samples() -> None:
        for record in range(num_images):
            reference[record]

    peers = {
        "ours: a sample": make_samples,
        f"ours: a sample, collated into batches of {recipe.batch_size}": make_batches,
        "ours: read and decode": decode,
    }
    for interpolation in recipe.interpolations:
        peers[f"ours: a sample, always {interpolation}"] = by_one_method(interpolation)
    peers["ours and the device's work (colour jitter, normalise)"] = make_inputs
    peers["original, re-implemented: all of it in the worker"] = original_samples
    times = race(peers, args.rounds)
    title = f"Input pipeline, {num_images} images"
    print_speeds(title, times, num_images, "ours: a sample", "ours: a sample")


if __name__ == "__main__":
    main()
