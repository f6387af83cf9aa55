#!/usr/bin/env python3
"""Input pipeline of ssd_resnet34 on real images: images a second on one core.

Ours against its own parts and against the original's way (see ssd_resnet34/reference.py). The
original changes colours and encodes targets in the worker, ours on the device: the row that adds
our device's part to the worker's shows what both together cost a CPU.
"""

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import torch
from torch.utils.data import default_collate

from benchmarks.ssd_resnet34.reference import ReferenceSet
from benchmarks.timing import print_speeds, race
from common.coco.images import read_image
from common.coco.index import find_coco, read_index
from ssd_resnet34.augment import augment
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import TrainingSet, apply_crop, crop_window, resize, training_records
from ssd_resnet34.loss import DetectionLoss

AIM = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe = RECIPES["1p"]
    records = training_records(read_index(*find_coco(args.data, "train")))
    ours, images = TrainingSet(records, recipe, seed=0), range(len(records))
    reference = ReferenceSet(records, ours.truth, recipe)
    criterion = DetectionLoss(recipe, len(records.class_names))
    decoded = [read_image(records.path(k)) for k in images]
    cuts = []
    for k in images:
        boxes, labels = ours.truth(k)
        window = crop_window(boxes, recipe, random.Random(f"0 0 {k}"))
        cuts.append((decoded[k], boxes, labels, window))

    epoch = iter(range(10**9))  # a round draws anew

    def samples() -> list:
        number = next(epoch)
        return [ours[number, k, k] for k in images]

    def batch():
        return default_collate(samples())

    def with_device() -> None:
        collated = batch()
        _, boxes = augment(collated, recipe)
        criterion.targets(boxes, collated.labels, collated.valid)

    def decode() -> None:
        for k in images:
            read_image(records.path(k))

    def crop_and_resize() -> None:
        for image, boxes, labels, window in cuts:
            cut = image if window is None else apply_crop(image, boxes, labels, window)[0]
            resize(cut, recipe.image_size)

    def original() -> None:
        for k in images:
            reference[k]

    peers = {
        "ours: a sample": samples,
        "ours: a sample, collated into its batch": batch,
        "part of ours: read and decode": decode,
        "part of ours: crop and resize": crop_and_resize,
        "ours and the device's part (flip, colour, normalise, match)": with_device,
        "original, re-implemented: all of it in the worker": original,
    }
    times = race(peers, args.rounds)
    title = f"Input pipeline, {len(images)} images, aim {AIM} images/s a core"
    print_speeds(title, times, len(images), "ours: a sample", "ours: a sample")


if __name__ == "__main__":
    main()
