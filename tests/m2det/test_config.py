import dataclasses
from dataclasses import replace

import pytest

from common.arithmetic import ceil_div
from common.errors import UserError
from m2det.anchors import make_anchors
from m2det.config import RECIPES

PER_EPOCH = 100


def rate(recipe, iteration, world_size=1):
    return recipe.lr_at(iteration, PER_EPOCH, world_size, recipe.batch_size)


def test_published_recipes():
    """The table of the original's configurations; 512 is the port's."""
    sizes = {name: (r.image_size, r.batch_size, r.lr) for name, r in RECIPES.items()}
    assert sizes["512_vgg"] == (512, 16, 0.001)
    assert sizes["512_vgg_original"] == (512, 16, 0.004)
    assert sizes["320_vgg"] == (320, 16, 0.004)
    assert sizes["320_resnet101"] == (320, 12, 0.004)
    assert sizes["704_vgg"] == (704, 11, 0.004)
    assert sizes["800_vgg"] == (800, 9, 0.004)
    first = next(iter(RECIPES.values()))
    assert first is RECIPES["512_vgg"]
    assert (first.epochs, first.momentum, first.weight_decay) == (160, 0.9, 5e-4)
    assert (first.amp, first.loss_scale, first.sfam) == ("O1", "32", False)


def test_an_unknown_nms_is_refused():
    with pytest.raises(UserError) as error:
        replace(RECIPES["512_vgg"], nms="sotf")
    assert str(error.value) == "--nms sotf: not one of soft, hard"


@pytest.mark.parametrize(
    ("name", "anchors"),
    [("320_vgg", 12810), ("512_vgg", 32760), ("704_vgg", 62022), ("800_vgg", 80208)],
)
def test_anchors(name, anchors):
    assert make_anchors(RECIPES[name]).shape == (anchors, 4)


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_recipes_of_this_network(name):
    recipe = RECIPES[name]
    levels = len(recipe.anchor_maps)
    assert len(recipe.anchor_sizes) == levels + 1
    assert len(recipe.anchor_steps) == levels
    decays = recipe.lr_last_epochs[1:] or recipe.lr_decay_at
    assert len(recipe.lr_factors) == 1 + len(decays)
    # Strided convolutions of 3 with padding 1, then one without.
    cells = recipe.image_size
    maps = []
    for _ in range(7):
        cells = ceil_div(cells, 2)
        maps.append(cells)
    assert recipe.anchor_maps == (*maps[2:], maps[-1] - 2)


def test_warm_up_then_the_last_epoch_of_each_rate():
    recipe = replace(RECIPES["512_vgg_original"], lr_last_epochs=(7, 8), epochs=10)
    assert rate(recipe, 0) == 1e-6
    assert rate(recipe, 250) == pytest.approx((0.004 + 1e-6) / 2)
    found = [rate(recipe, PER_EPOCH * epoch + k) for epoch in (5, 6, 7, 8) for k in (0, 99)]
    assert found == pytest.approx([0.004] * 4 + [0.002] * 2 + [0.0004] * 2)
    assert rate(recipe, 0, 8) == rate(recipe, 0)
    assert rate(replace(recipe, warmup_epochs=0), 0) == 0.004
    assert rate(replace(recipe, lr_last_epochs=(1,)), 3000) == 0.002


def test_the_listing_names_every_field():
    recipe = RECIPES["320_vgg"]
    lines = dict(line.split(" = ", 1) for line in recipe.listing().split("\n"))
    assert lines == {f.name: repr(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}
