#!/usr/bin/env python3
"""Input pipeline of ssd_mmdet on real images: images a second on one core.

Ours against its own parts and against the original's way (see ssd_mmdet/reference.py). The
original changes colours and normalises in the worker, ours on the device: the row that adds our
device's part to the worker's shows what both together cost a CPU.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import cv2
import torch
from torch.utils.data import default_collate

from benchmarks.ssd_mmdet.reference import ReferenceSet
from benchmarks.timing import print_speeds, race
from common.coco.images import read_image
from common.coco.index import find_coco, read_index
from ssd_mmdet.augment import augment
from ssd_mmdet.config import RECIPES
from ssd_mmdet.data import TrainingSet, training_records

AIM = "at least 500 images/s and 4 times the original"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--recipe", default="1p", choices=RECIPES)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    recipe = RECIPES[args.recipe]
    records = training_records(read_index(*find_coco(args.data, "train")))
    ours, images = TrainingSet(records, recipe, seed=0), range(len(records))
    reference = ReferenceSet(records, ours.truth, recipe)
    epoch = iter(range(10**9))  # a round draws anew

    def samples() -> list:
        number = next(epoch)
        return [ours[number, k, k] for k in images]

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
        "ours: a sample, collated into its batch": lambda: default_collate(samples()),
        "part of ours: read and decode": decode,
        "ours and the device's part (flip, colour, normalise)": with_device,
        "original, re-implemented: all of it in the worker": original,
    }
    times = race(peers, args.rounds)
    title = f"Input pipeline, {len(images)} images, aim {AIM}"
    print_speeds(title, times, len(images), "ours: a sample", "ours: a sample")


if __name__ == "__main__":
    main()
