#!/usr/bin/env python3
"""Records and input pipeline of the TFRecord recipe on real images, on one core.

Reading is compared with plain reading of the same files; a training sample with its steps and with
a sample of the COCO recipe, which reads a folder of JPEG files. The folder is converted before.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import numpy as np
import torch

from benchmarks.timing import print_speeds, print_table, race, ratio
from common.coco.images import decode_image
from common.coco.index import read_index
from common.coco.layout import find_coco
from ssd_resnet34 import config as coco_config
from ssd_resnet34 import data as coco_data
from ssd_resnet34.tfrecord import index as record_index
from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from ssd_resnet34.tfrecord.config import RECIPES, Recipe
from ssd_resnet34.tfrecord.data import (
    TrainingSet,
    crop_image,
    crop_window,
    resize_crop,
    training_records,
)
from ssd_resnet34.tfrecord.index import RecordIndex
from ssd_resnet34.tfrecord.records import match_files, read_records

PASSES = 20  # over the files in a round: one alone is too short to time
PLAIN_READING = "plain reading of the files"
COCO_RECIPE = "COCO recipe: a sample from a folder of JPEG files"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    annotation_file, image_dir, _ = find_coco(args.data, "train")
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(image_dir), Path(annotation_file), Path(folder) / "train2017", 4)
        pattern = f"{folder}/train2017*"
        measure_reading(pattern, args.rounds)
        measure_samples(pattern, annotation_file, image_dir, args.rounds)


def measure_reading(pattern: str, rounds: int) -> None:
    """Print records and MB a second of a core, with the files in the page cache."""
    files = match_files(pattern, "pattern")
    num_bytes = sum(Path(path).stat().st_size for path in files)
    index = record_index.read_index(pattern, "pattern")

    def read_plainly() -> None:
        for path in files:
            Path(path).read_bytes()

    def read_in_file_order() -> None:
        for path in files:
            for _ in read_records(path):
                pass

    def read_one_by_one() -> None:
        for record in range(len(index)):
            index.read(record)

    def read_the_index() -> None:
        record_index.read_index(pattern, "pattern")

    peers = {
        PLAIN_READING: several_passes(read_plainly),
        "records in file order, checksums verified": several_passes(read_in_file_order),
        "records one by one, verified and parsed, as in training": several_passes(read_one_by_one),
        "index at the start of a run: all read and parsed": several_passes(read_the_index),
    }
    times = race(peers, rounds)
    rows = []
    for name, timing in times.items():
        seconds = np.median(timing.cpu) / PASSES
        records_per_second = f"{len(index) / seconds:,.0f}"
        megabytes_per_second = f"{num_bytes / seconds / 1e6:,.0f}"
        relative_time = f"{ratio(timing.cpu, times[PLAIN_READING].cpu):.2f}"
        rows.append((name, records_per_second, megabytes_per_second, relative_time))
    header = ("", "records/s a core", "MB/s a core", "time, plain = 1")
    print_table(f"Reading {len(index)} records, {num_bytes / 1e6:.1f} MB", header, rows)


def several_passes(read: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(PASSES):
            read()

    return run


def measure_samples(pattern: str, annotation_file: str, image_dir: str, rounds: int) -> None:
    """Print the time of a training sample of both recipes, and of the steps of ours."""
    recipe = RECIPES["port"]
    records = training_records(record_index.read_index(pattern, "pattern"))
    images = coco_data.training_records(read_index(annotation_file, image_dir))
    if len(images) != len(records):
        raise SystemExit("the two recipes do not train on the same images of this folder")
    coco_set = coco_data.TrainingSet(images, coco_config.RECIPES["1p"], seed=0)
    peers = {
        COCO_RECIPE: draw_epochs(coco_set),
        "TFRecord recipe: a sample from records": draw_epochs(TrainingSet(records, recipe, seed=0)),
        **steps_of_a_sample(records, recipe),
    }
    times = race(peers, rounds, warmup=2)
    title = f"Input pipeline, {len(records)} images"
    print_speeds(title, times, len(records), COCO_RECIPE, "COCO recipe")


def draw_epochs(dataset: torch.utils.data.Dataset) -> Callable[[], None]:
    """Return a function that draws another epoch at each call: crops differ from round to round."""
    epoch = 0

    def run() -> None:
        nonlocal epoch
        epoch += 1
        for record in range(len(dataset)):
            dataset[epoch, record, record]

    return run


def steps_of_a_sample(records: RecordIndex, recipe: Recipe) -> dict[str, Callable[[], None]]:
    annotated = [records.read(record) for record in range(len(records))]
    decoded = [decode_image(image.encoded, "record") for image in annotated]
    rng = np.random.default_rng(0)

    def read() -> None:
        for record in range(len(records)):
            records.read(record)

    def decode() -> None:
        for image in annotated:
            decode_image(image.encoded, "record")

    def choose_windows() -> None:
        for image, pixels in zip(annotated, decoded, strict=True):
            crop_window(image.boxes_xyxy, pixels.shape, recipe, rng)

    def crop_and_resize() -> None:
        for image, pixels in zip(annotated, decoded, strict=True):
            window = crop_window(image.boxes_xyxy, pixels.shape, recipe, rng)
            if window is not None:
                pixels = crop_image(pixels, window)
            resize_crop(pixels, recipe.image_size)

    return {
        "of which: read, verify and parse": read,
        "of which: decode": decode,
        "of which: choose the window": choose_windows,
        "of which: choose the window, crop and resize": crop_and_resize,
    }


if __name__ == "__main__":
    main()
