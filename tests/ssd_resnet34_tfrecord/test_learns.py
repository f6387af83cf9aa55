"""A small network remembers the records of two real images, trained by tfrecord/train.py."""

import json

import pytest

from ssd_resnet34.tfrecord import train
from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from tests import learning
from tests.scripts import TINY

# A warm-up and clipped gradients make up for the weights that are not pretrained.
RECIPE = """
    --recipe=small --no-augment --clip_norm=10
    --train_batch_size=2 --num_examples_per_epoch=2 --num_epochs=45
    --lr=0.32 --lr_warmup_epochs=8 --lr_cosine_epochs=45 --log_interval=1
"""


@pytest.mark.slow
def test_two_real_images_are_remembered(tmp_path):
    annotations = learning.write_annotations(tmp_path / "two_images.json")
    convert(TINY / "train2017", annotations, tmp_path / "records", num_shards=1)
    categories = json.loads(annotations.read_text())["categories"]
    category_ids = [str(category["id"]) for category in categories]
    output = tmp_path / "out"
    flags = [
        *RECIPE.split(),
        *learning.PLAIN_RUN,
        "--category_ids",
        *category_ids,
        f"--training_file_pattern={tmp_path}/records*",
        f"--validation_file_pattern={tmp_path}/records*",
        f"--val_json_file={annotations}",
        f"--model_dir={output}",
    ]
    train.main(flags)
    learning.assert_remembered(output)
