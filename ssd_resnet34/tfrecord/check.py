"""`--check_data`: read every record and image once, to name what is wrong in them before a run."""

import sys
from pathlib import Path

from tqdm import tqdm

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
) -> int:
    """Print what is wrong in the annotation file and in each record; return the exit status.

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
    for flag, records in indexes.items():
        records = categories.of(records)
        try:
            if flag == TRAINING_FLAG:
                print(trained_records_line(records))
            elif has_annotations:
                records, _ = validation_records(records, val_json_file)
        except UserError as error:
            num_errors += 1
            print(error, file=sys.stderr)
        num_errors += check_records(records, flag)
        print(f"{flag}: {len(records)} records, {records.num_boxes.sum()} boxes")
    print(f"{num_errors} errors")
    return int(num_errors > 0)


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


def check_records(records: RecordIndex, label: str) -> int:
    """Print a line for each record that cannot be used, and return their number.

    `label` stands at the progress bar.
    """
    num_errors = 0
    for record in tqdm(range(len(records)), label, unit="record", disable=None):
        try:
            check_record(records, record)
        except UserError as error:
            num_errors += 1
            print(error, file=sys.stderr)
    return num_errors


def check_record(records: RecordIndex, record: int) -> None:
    """Raise UserError for a record that training could not use."""
    image = records.read(record)
    records.pixels(image, record)
    records.labels(image, record)
