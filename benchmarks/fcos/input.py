#!/usr/bin/env python3
"""Input pipeline of fcos on real images at 800 x 1333: images a second on one core.

Ours is compared with its own steps and with the original's way (see fcos/reference.py). The
original normalises and pads in the worker, ours on the device. So there is a row that adds our
device's work to the worker's, which shows what both together cost a CPU. All images of a batch have
the same orientation.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

from dataclasses import replace

import cv2
import torch

from benchmarks.fcos.reference import ReferenceSet
from benchmarks.timing import print_speeds, race
from common.coco.images import read_image
from common.coco.index import read_index
from common.coco.layout import find_coco
from common.npu.distributed import Ranks
from fcos.augment import augment
from fcos.config import RECIPES
from fcos.data import (
    Batch,
    Sample,
    TrainingOrder,
    TrainingSet,
    iterations_per_epoch,
    training_records,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    recipe = replace(RECIPES["gn"], batch_size=args.batch_size)
    annotation_file, image_dir, _ = find_coco(args.data, "train")
    records = training_records(read_index(annotation_file, image_dir))
    dataset = TrainingSet(records, recipe, seed=0)
    reference = ReferenceSet(records, dataset.ground_truth, recipe)
    steps = iterations_per_epoch(records, recipe, world_size=1)
    order = TrainingOrder(records, recipe, Ranks(), seed=0, start=0, end=steps)
    batches_of_keys = list(order)  # a key is (epoch, position, record)
    keys = [key for batch in batches_of_keys for key in batch]

    def make_samples(batch: list[tuple[int, int, int]]) -> list[Sample]:
        return [dataset[key] for key in batch]

    def make_batch(batch: list[tuple[int, int, int]]) -> Batch:
        return dataset.collate(make_samples(batch))

    def make_batches() -> None:
        for batch in batches_of_keys:
            make_batch(batch)

    def decode() -> None:
        for _, _, record in keys:
            read_image(records.path(record))

    def decode_and_resize() -> None:
        for batch in batches_of_keys:
            make_samples(batch)

    def make_inputs() -> None:
        for batch in batches_of_keys:
            augment(make_batch(batch), recipe)

    def original_samples() -> None:
        for _, _, record in keys:
            reference[record]

    def original_batches() -> None:
        for batch in batches_of_keys:
            reference.collate([reference[record] for _, _, record in batch])

    peers = {
        "ours: decode, resize, collate": make_batches,
        "ours: decode": decode,
        "ours: decode, resize": decode_and_resize,
        "ours and the device's work (normalise, pad)": make_inputs,
        "original, re-implemented: a sample": original_samples,
        "original, re-implemented: a sample, collated": original_batches,
    }
    times = race(peers, args.rounds)
    title = f"Input pipeline, {len(keys)} images, batch {args.batch_size}"
    print_speeds(title, times, len(keys), "ours: decode, resize, collate", "ours")


if __name__ == "__main__":
    main()
