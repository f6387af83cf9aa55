"""`--check_data`: read every record and image once, to name what is wrong in them before a run.

What the training records hold, and what of it the network sees, is printed and drawn as well.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.coco.check import look_at_boxes
from common.coco.counts import TrainingBoxes
from common.coco.coverage import Presets
from common.coco.index import Severity, read_annotations
from common.errors import UserError
from ssd_resnet34.tfrecord.categories import find_categories
from ssd_resnet34.tfrecord.data import trained_records_line
from ssd_resnet34.tfrecord.evaluate import validation_records
from ssd_resnet34.tfrecord.index import RecordIndex, read_index

TRAINING_FLAG = "--training_file_pattern"
VALIDATION_FLAG = "--validation_file_pattern"


def check_data(
    training_pattern: str,
    validation_pattern: str,
    val_json_file: str,
    category_ids: tuple[int, ...] | None,
    output_dir: Path,
    presets: Presets,
) -> int:
    """Print what is wrong in the annotation file and in each record; return the exit status.

    After that print what the training records hold and what of it `presets` see, and draw it beside
    `output_dir`, unless there are errors in them.

    The patterns are globs; an empty one is skipped. Without `category_ids`, those of the flag, the
    classes are those that a new run on the training files would have, or on the validation files
    where there are no others.
    """
    patterns = {TRAINING_FLAG: training_pattern, VALIDATION_FLAG: validation_pattern}
    indexes = {}
    for flag, pattern in patterns.items():
        if pattern:
            indexes[flag] = read_index(pattern, flag)
    if not indexes:
        raise UserError("--check_data: no records", f"give {TRAINING_FLAG} or {VALIDATION_FLAG}")
    first = next(iter(indexes.values()))

    num_errors = 0
    has_annotations = bool(val_json_file) and Path(val_json_file).is_file()
    if has_annotations:
        num_errors = check_annotations(val_json_file, first)
        if num_errors:
            print(f"{num_errors} errors; the records are checked once {val_json_file} has none")
            return 1
    categories = find_categories(category_ids, None, val_json_file, first)
    if not categories.are_cocos:
        print(categories.line())
    boxes = None
    for flag, records in indexes.items():
        records = categories.of(records)
        num_errors_before = num_errors
        try:
            if flag == TRAINING_FLAG:
                print(trained_records_line(records))
            elif has_annotations:
                records, _ = validation_records(records, val_json_file)
        except UserError as error:
            num_errors += 1
            print(error, file=sys.stderr)
        collector = BoxCollector(records.class_names)
        num_errors += check_records(records, flag, collector)
        print(f"{flag}: {len(records)} records, {records.num_boxes.sum()} boxes")
        if flag == TRAINING_FLAG and num_errors == num_errors_before:
            boxes = collector.boxes()
    print(f"{num_errors} errors")
    if boxes is not None:
        look_at_boxes(boxes, presets, output_dir)
    elif TRAINING_FLAG in indexes:
        print("the boxes are counted once the training records have no error")
    return int(num_errors > 0)


class BoxCollector:
    """Collects the boxes of records while these are checked: the index does not have them."""

    def __init__(self, class_names: tuple[str, ...]):
        self.class_names = class_names
        self._image_sizes: list[tuple[int, int]] = []
        self._boxes_xyxy: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, size: tuple[int, int], boxes_xyxy: np.ndarray, labels: np.ndarray) -> None:
        """Add an image of this (height, width) with normalised boxes (n, 4) and labels (n,)."""
        height, width = size
        self._image_sizes.append(size)
        self._boxes_xyxy.append(boxes_xyxy.clip(0, 1) * [width, height, width, height])
        self._labels.append(labels)

    def boxes(self) -> TrainingBoxes:
        """Return all that was added."""
        num_boxes = [len(labels) for labels in self._labels]
        return TrainingBoxes(
            image_sizes=np.array(self._image_sizes, np.int64),
            image_of_box=np.repeat(np.arange(len(num_boxes)), num_boxes),
            boxes_xyxy=np.concatenate(self._boxes_xyxy),
            labels=np.concatenate(self._labels),
            class_names=self.class_names,
            num_crowds=None,
        )


def check_annotations(val_json_file: str, records: RecordIndex) -> int:
    """Print all that is noticed in the annotation file, and return the number of errors.

    Categories that the `records` use are classes.
    """
    names = [name for _, name in records.categories]
    annotations = read_annotations(val_json_file, classes=names, examples=None)
    num_errors = 0
    for rule, findings in annotations.broken_rules().items():
        if rule.severity is Severity.ERROR:
            num_errors += findings.count
    for line in annotations.lines(limit=None):
        print(f"{val_json_file}: {line}")
    return num_errors


def check_records(records: RecordIndex, label: str, collector: BoxCollector) -> int:
    """Print a line for each record that cannot be used, and return their number.

    `label` stands at the progress bar. The boxes of the others are added to the `collector`.
    """
    num_errors = 0
    for record in tqdm(range(len(records)), label, unit="record", disable=None):
        try:
            check_record(records, record, collector)
        except UserError as error:
            num_errors += 1
            print(error, file=sys.stderr)
    return num_errors


def check_record(records: RecordIndex, record: int, collector: BoxCollector) -> None:
    """Add the boxes of a record. Raise UserError for a record that training could not use."""
    image = records.read(record)
    pixels = records.pixels(image, record)
    labels = records.labels(image, record)
    collector.add(pixels.shape[:2], image.boxes_xyxy, labels)
