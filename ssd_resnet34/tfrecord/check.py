"""`--check_data`: read every record and image once, to name what is wrong in them before a run."""

import sys
from collections.abc import Mapping

from tqdm import tqdm

from common.coco.images import decode_image
from common.errors import UserError
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.example import REMEDY
from ssd_resnet34.tfrecord.index import RecordIndex, read_index


def check_records(patterns: Mapping[str, str], recipe: Recipe) -> int:
    """Print a line for each unusable record and return the exit status.

    `patterns` has the glob pattern of each flag; an empty one is skipped.
    """
    errors = 0
    for flag, pattern in patterns.items():
        if not pattern:
            continue
        records = read_index(pattern, flag, recipe.category_ids)
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
    decode_image(image.encoded, records.where(record), REMEDY)
    records.labels(image, record)
