#!/usr/bin/env python3
"""Input pipeline of ssd_mmdet on real images: images a second on one core.

Ours is compared with its own steps and with the original's way (see ssd_mmdet/reference.py). The
original changes colours and normalises in the worker, ours on the device. So there is a row that
adds our device's work to the worker's, which shows what both together cost a CPU.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import itertools

import cv2
import torch
from torch.utils.data import default_collate

from benchmarks.ssd_mmdet.reference import ReferenceSet
from benchmarks.timing import print_speeds, race
from common.coco.images import read_image
from common.coco.index import read_index
from common.coco.layout import find_coco
from ssd_mmdet.augment import augment
from ssd_mmdet.config import RECIPES
from ssd_mmdet.data import Batch, TrainingSet, training_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--recipe", default="1p", choices=RECIPES)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    recipe = RECIPES[args.recipe]
    annotation_file, image_dir, _ = find_coco(args.data, "train")
    records = training_records(read_index(annotation_file, image_dir))
    dataset = TrainingSet(records, recipe, seed=0)
    reference = ReferenceSet(records, dataset.ground_truth, recipe)
    epochs = itertools.count()  # another one in each round, with other random numbers

    def make_samples() -> list[Batch]:
        epoch = next(epochs)
        return [dataset[epoch, record, record] for record in range(len(records))]

    def make_batches() -> list[Batch]:
        samples = make_samples()
        batches = []
        for first in range(0, len(samples), recipe.batch_size):
            batches.append(default_collate(samples[first : first + recipe.batch_size]))
        return batches

    def decode() -> None:
        for record in range(len(records)):
            read_image(records.path(record))

    def make_inputs() -> None:
        for batch in make_batches():
            augment(batch, recipe)

    def original() -> None:
        for record in range(len(records)):
            reference[record]

    peers = {
        "ours: a sample": make_samples,
        "ours: a sample, collated into its batch": make_batches,
        "ours: decode": decode,
        "ours and the device's work (colour jitter, flip, normalise)": make_inputs,
        "original, re-implemented: all of it in the worker": original,
    }
    times = race(peers, args.rounds)
    title = f"Input pipeline, {len(records)} images"
    print_speeds(title, times, len(records), "ours: a sample", "ours: a sample")


if __name__ == "__main__":
    main()
