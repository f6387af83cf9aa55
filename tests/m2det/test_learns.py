"""A small M2Det remembers two real images, trained and evaluated by train.py."""

from dataclasses import replace

import pytest

from m2det import train
from m2det.config import RECIPES
from tests import learning

# A quarter of the pixels of the smallest recipe, and its anchors without those of the first map.
SMALL = replace(
    RECIPES["quickstart"],
    image_size=160,
    anchor_maps=(20, 10, 5, 3, 1),
    anchor_steps=(8, 16, 32, 54, 160),
    anchor_sizes=(0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
)
RECIPE = """
    --recipe=small --bn_momentum=0.1
    --batch_size=2 --epochs=60 --lr=0.02 --warmup_epochs=5 --lr_last_epochs 48 60
"""


@pytest.mark.slow
def test_two_real_images_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "small", SMALL)
    output = tmp_path / "out"
    flags = [*RECIPE.split(), *learning.PLAIN_RUN, *learning.coco_flags(tmp_path)]
    train.main([*flags, f"--output_dir={output}"])
    learning.assert_remembered(output)
