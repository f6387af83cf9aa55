"""The check of records, as train.py calls it."""

from common.coco.coverage import Presets
from ssd_resnet34.tfrecord.check import check_data
from ssd_resnet34.tfrecord.config import RECIPES
from ssd_resnet34.tfrecord.coverage import MATCHING


def check(folder, training_pattern, validation_pattern, val_json_file, category_ids):
    """Check records with the preset "small"; the picture goes into `folder`."""
    return check_data(
        training_pattern,
        validation_pattern,
        val_json_file,
        category_ids,
        folder / "run",
        Presets("small", RECIPES["small"], RECIPES, MATCHING),
    )
