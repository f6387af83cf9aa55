#!/usr/bin/env python3
"""Records and input pipeline of the TFRecord recipe on real images, on one core.

Reading against plain reading of the same files; a training sample against its parts and against
one of the first recipe, which reads a folder of JPEG files. The folder is converted first.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import numpy as np
import torch

from benchmarks.timing import print_speeds, print_table, race, ratio
from common.coco.images import EncodedImage
from common.coco.index import find_coco, read_index
from ssd_resnet34 import config as first_config
from ssd_resnet34 import data as first
from ssd_resnet34.tfrecord import index as record_index
from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from ssd_resnet34.tfrecord.config import RECIPES
from ssd_resnet34.tfrecord.data import (
    TrainingSet,
    crop_and_resize,
    crop_window,
    training_records,
)
from ssd_resnet34.tfrecord.records import match_files, read_records

PASSES = 20  # over the files, a round: one alone is too short to time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    annotations, images = find_coco(args.data, "train")
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(images), Path(annotations), Path(folder) / "train2017", 4)
        pattern = f"{folder}/train2017*"
        reading(pattern, args.rounds)
        samples(pattern, annotations, images, args.rounds)


def reading(pattern: str, rounds: int) -> None:
    """Records a second and MB a second of a core, files in the page cache."""
    files = match_files(pattern, "pattern")
    size = sum(Path(path).stat().st_size for path in files)
    index = record_index.read_index(pattern, "pattern")

    def passes(read):
        def run() -> None:
            for _ in range(PASSES):
                read()

        return run

    def plain() -> None:
        for path in files:
            Path(path).read_bytes()

    def sequential() -> None:
        for path in files:
            for _ in read_records(path):
                pass

    def at_random() -> None:
        for i in range(len(index)):
            index.read(i)

    def places() -> None:
        record_index.read_index(pattern, "pattern")

    peers = {
        "plain reading of the files": plain,
        "records in file order, checksums verified": sequential,
        "records one by one, verified and parsed, as training reads": at_random,
        "index of a start: headers verified, images skipped": places,
    }
    times = race({name: passes(read) for name, read in peers.items()}, rounds)
    rows = []
    for name, timing in times.items():
        seconds = np.median(timing.cpu) / PASSES
        against = ratio(timing.cpu, times["plain reading of the files"].cpu)
        speed = (f"{len(index) / seconds:,.0f}", f"{size / seconds / 1e6:,.0f}")
        rows.append((name, *speed, f"{against:.2f}"))
    header = ("", "records/s a core", "MB/s a core", "time, plain = 1")
    print_table(f"Reading {len(index)} records, {size / 1e6:.1f} MB", header, rows)


def samples(pattern: str, annotations: str, images: str, rounds: int) -> None:
    """A training sample of both recipes, and the parts of ours."""
    recipe, folder_recipe = RECIPES["port"], first_config.RECIPES["1p"]
    records = training_records(record_index.read_index(pattern, "pattern"))
    ours, keys = TrainingSet(records, recipe, seed=0), range(len(records))
    folder_records = first.training_records(read_index(annotations, images))
    folder = first.TrainingSet(folder_records, folder_recipe, seed=0)
    if len(folder) != len(ours):
        raise SystemExit("the two recipes do not train on the same images of this folder")
    read = [records.read(k) for k in keys]
    decoded = [EncodedImage(found.encoded, "record")[:] for found in read]
    # Draws of a round: some crops are the whole image, and rounds should not all have the same.
    epochs = {"ours": 0, "folder": 0, "window": 0}

    def next_epoch(name: str) -> int:
        epochs[name] += 1
        return epochs[name]

    def our_samples() -> None:
        epoch = next_epoch("ours")
        for k in keys:
            ours[epoch, k, k]

    def folder_samples() -> None:
        epoch = next_epoch("folder")
        for k in keys:
            folder[epoch, k, k]

    def reads() -> None:
        for k in keys:
            records.read(k)

    def decodes() -> None:
        for found in read:
            EncodedImage(found.encoded, "record")[:]

    def crops() -> None:
        rng = np.random.default_rng(next_epoch("window"))
        for found, image in zip(read, decoded, strict=True):
            window = crop_window(found.boxes_ltrb, image.shape, recipe, rng)
            crop_and_resize(image, window, recipe.image_size)

    peers = {
        "first recipe: a sample from a folder of JPEG files": folder_samples,
        "this recipe: a sample from records": our_samples,
        "part of it: read, verify and parse": reads,
        "part of it: decode": decodes,
        "part of it: choose the window, crop and resize": crops,
    }
    times = race(peers, rounds, warmup=2)
    base = "first recipe: a sample from a folder of JPEG files"
    title = f"Input pipeline, {len(records)} images"
    print_speeds(title, times, len(records), base, "first recipe")


if __name__ == "__main__":
    main()
