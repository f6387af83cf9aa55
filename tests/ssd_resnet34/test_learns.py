"""A small SSD300-ResNet remembers two real images, trained and evaluated by train.py."""

import pytest

from ssd_resnet34 import train
from tests import learning

# A warm-up and clipped gradients make up for the weights that are not pretrained.
RECIPE = """
    --backbone=resnet10 --no-augment --clip_norm=10
    --batch_size=2 --epochs=42 --lr=0.32 --lr_step=0 --warmup=8 --warmup_factor=0
    --lr_decay_epochs=32 --evaluation=42 --threshold=0
"""


@pytest.mark.slow
def test_two_real_images_are_remembered(tmp_path):
    output = tmp_path / "out"
    flags = [*RECIPE.split(), *learning.PLAIN_RUN, *learning.coco_flags(tmp_path)]
    train.main([*flags, f"--output_dir={output}"])
    learning.assert_remembered(output)
