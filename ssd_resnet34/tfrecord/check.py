"""`--check_data`: read every record and image once, to name what is wrong in them before a run."""

import sys
from collections.abc import Mapping

from tqdm import tqdm

from common.errors import UserError
from ssd_resnet34.tfrecord.categories import find_categories
from ssd_resnet34.tfrecord.example import decode_pixels
from ssd_resnet34.tfrecord.index import RecordIndex, read_index


def check_records(
    patterns: Mapping[str, str], category_ids: tuple[int, ...] | None, val_json_file: str
) -> int:
    """Print a line for each unusable record and return the exit status.

    `patterns` has the glob pattern of each flag; an empty one is skipped. Without `category_ids`,
    those of the flag, the classes are those that a new run on the first files would have.
    """
    errors = 0
    categories = None
    for flag, pattern in patterns.items():
        if not pattern:
            continue
        records = read_index(pattern, flag)
        if categories is None:
            categories = find_categories(category_ids, None, val_json_file, records)
            if not categories.are_cocos:
                print(categories.line())
        records = categories.of(records)
        for record in tqdm(range(len(records)), flag, unit="record", disable=None):
            try:
                check_record(records, record)
            except UserError as error:
                errors += 1
                print(error, file=sys.stderr)
        print(f"{flag}: {len(records)} records, {records.num_boxes.sum()} boxes")
    print(f"{errors} errors")
    return int(errors > 0)


def check_record(records: RecordIndex, record: int) -> None:
    """Raise UserError for a record that training could not use."""
    image = records.read(record)
    decode_pixels(image, records.where(record))
    records.labels(image, record)
