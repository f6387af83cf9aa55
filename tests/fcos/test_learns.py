"""A small FCOS remembers two real images, trained and evaluated by train.py."""

import pytest

from fcos import train
from tests import learning

RECIPE = """
    --recipe=quickstart --tower_convs=1 --img_scale=96,160 --eval_shapes=two --no-augment
    --batch_size=2 --epochs=60 --lr=0.05 --warmup=0 --lr_decay_epochs=50
"""


@pytest.mark.slow
def test_two_real_images_are_remembered(tmp_path):
    output = tmp_path / "out"
    flags = [*RECIPE.split(), *learning.PLAIN_RUN, *learning.coco_flags(tmp_path)]
    train.main([*flags, f"--output_dir={output}"])
    learning.assert_remembered(output)
