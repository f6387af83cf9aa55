"""Reading every record and image once, to name what is wrong in them before a run does."""

import sys
from collections.abc import Mapping

from tqdm import tqdm

from common.coco.images import EncodedImage
from common.errors import UserError
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.data import TrainingSet
from ssd_resnet34.tfrecord.example import REMEDY
from ssd_resnet34.tfrecord.index import read_index


def check_records(patterns: Mapping[str, str], recipe: Recipe) -> int:
    """A line for each unusable record of the files of each flag's pattern; the exit status."""
    errors = 0
    for flag, pattern in patterns.items():
        if not pattern:
            continue
        records = read_index(pattern, flag, recipe.category_ids)
        labels = TrainingSet(records, recipe, seed=0).labels
        for i in tqdm(range(len(records)), flag, unit="record", disable=None):
            where = records.where(i)
            try:
                found = records.read(i)
                EncodedImage(found.encoded, where, REMEDY)[:]
                labels(found.category_ids, where)
            except UserError as error:
                errors += 1
                print(error, file=sys.stderr)
        print(f"{flag}: {len(records)} records, {int(records.boxes.sum())} boxes")
    print(f"{errors} errors")
    return int(errors > 0)
