#!/usr/bin/env python3
"""Input pipeline of ssd_resnet34 on real images: images a second on one core.

Ours is compared with its own steps and with the original's way (see ssd_resnet34/reference.py). The
original changes colours and encodes targets in the worker, ours on the device. So there is a row
that adds our device's work to the worker's, which shows what both together cost a CPU.
"""

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import itertools

import torch
from torch.utils.data import default_collate

from benchmarks.ssd_resnet34.reference import ReferenceSet
from benchmarks.timing import print_speeds, race
from common.coco.images import read_image
from common.coco.index import read_index
from common.coco.layout import find_coco
from ssd_resnet34.augment import augment
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import (
    Batch,
    TrainingSet,
    apply_crop,
    crop_window,
    resize,
    training_records,
)
from ssd_resnet34.loss import DetectionLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recipe = RECIPES["1p"]
    annotation_file, image_dir, _ = find_coco(args.data, "train")
    records = training_records(read_index(annotation_file, image_dir))
    num_images = len(records)
    dataset = TrainingSet(records, recipe, seed=0)
    reference = ReferenceSet(records, dataset.ground_truth, recipe)
    criterion = DetectionLoss(recipe, len(records.class_names))
    epochs = itertools.count()  # each round draws anew

    def make_samples() -> list[Batch]:
        epoch = next(epochs)
        return [dataset[epoch, record, record] for record in range(num_images)]

    def make_batch() -> Batch:
        return default_collate(make_samples())

    def make_batch_and_prepare_step() -> None:
        batch = make_batch()
        _, boxes = augment(batch, recipe)
        criterion.targets(boxes, batch.labels, batch.valid)

    def decode() -> None:
        for record in range(num_images):
            read_image(records.path(record))

    images = [read_image(records.path(record)) for record in range(num_images)]
    ground_truth = [dataset.ground_truth(record) for record in range(num_images)]
    windows = []
    for record, (boxes, _) in enumerate(ground_truth):
        windows.append(crop_window(boxes, recipe, random.Random(f"0 0 {record}")))

    def crop_and_resize() -> None:
        for image, (boxes, labels), window in zip(images, ground_truth, windows, strict=True):
            if window is not None:
                image, _, _ = apply_crop(image, boxes, labels, window)
            resize(image, recipe.image_size)

    def original() -> None:
        for record in range(num_images):
            reference[record]

    peers = {
        "ours: a sample": make_samples,
        "ours: a sample, collated into its batch": make_batch,
        "part of ours: read and decode": decode,
        "part of ours: crop and resize": crop_and_resize,
        "ours and the device's work (flip, colour, normalise, match)": make_batch_and_prepare_step,
        "original, re-implemented: all of it in the worker": original,
    }
    times = race(peers, args.rounds)
    title = f"Input pipeline, {num_images} images"
    print_speeds(title, times, num_images, "ours: a sample", "ours: a sample")


if __name__ == "__main__":
    main()
