#!/usr/bin/env python3
"""Input pipeline of fcos on real images at 800 x 1333: images a second on one core.

Ours against its own parts and against the original's way (see fcos/reference.py). The original
normalises and pads in the worker, ours on the device: the row that adds our device's part to the
worker's shows what both together cost a CPU. Batches hold images of one orientation.
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

from benchmarks.fcos.reference import ReferenceSet
from benchmarks.timing import print_speeds, race
from common.coco.images import read_image
from common.coco.index import find_coco, read_index
from common.npu.distributed import Ranks
from fcos.augment import augment
from fcos.config import RECIPES
from fcos.data import TrainingOrder, TrainingSet, iterations_per_epoch, training_records

AIM = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    recipe = RECIPES["gn"]
    records = training_records(read_index(*find_coco(args.data, "train")))
    ours = TrainingSet(records, recipe, seed=0)
    reference = ReferenceSet(records, ours.truth, recipe)
    steps = iterations_per_epoch(records, args.batch_size, 1)
    order = list(TrainingOrder(records, args.batch_size, Ranks(), 0, 0, steps))
    images = [key for batch in order for key in batch]

    def batches() -> None:
        for batch in order:
            ours.collate([ours[key] for key in batch])

    samples = [[ours[key] for key in batch] for batch in order]

    def resize_and_collate() -> None:
        for batch in samples:
            ours.collate(batch)

    def with_device() -> None:
        for batch in order:
            augment(ours.collate([ours[key] for key in batch]), recipe)

    def decode() -> None:
        for _, _, record in images:
            read_image(records.path(record))

    def original_samples() -> None:
        for _, _, record in images:
            reference[record]

    def original_batches() -> None:
        for batch in order:
            reference.collate([reference[record] for _, _, record in batch])

    peers = {
        "ours: decoded, resized, collated": batches,
        "part of ours: read and decode": decode,
        "part of ours: resize and collate": resize_and_collate,
        "ours and the device's part (normalise, pad)": with_device,
        "original, re-implemented: a sample": original_samples,
        "original, re-implemented: a sample, collated": original_batches,
    }
    times = race(peers, args.rounds)
    title = f"Input pipeline, {len(images)} images, batch {args.batch_size}"
    title += f", aim {AIM} images/s a core"
    print_speeds(title, times, len(images), "ours: decoded, resized, collated", "ours")


if __name__ == "__main__":
    main()
