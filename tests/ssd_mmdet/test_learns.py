"""A narrow SSD300-VGG16 remembers two real images, trained and evaluated by train.py."""

import pytest

from ssd_mmdet import train
from tests import learning

# No layer has a batch norm and no weight is pretrained: clipped gradients make up for both.
RECIPE = """
    --width=0.0625 --no-augment --clip_norm=4
    --batch_size=2 --repeat=1 --epochs=100 --lr=0.64 --warmup=10 --lr_decay_epochs=80
    --evaluation=100
"""


@pytest.mark.slow
def test_two_real_images_are_remembered(tmp_path):
    output = tmp_path / "out"
    flags = [*RECIPE.split(), *learning.PLAIN_RUN, *learning.coco_flags(tmp_path)]
    train.main([*flags, f"--output_dir={output}"])
    learning.assert_remembered(output)
