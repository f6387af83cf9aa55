import dataclasses
from itertools import pairwise

import pytest

from ssd_mmdet.config import RECIPES, Recipe

PER_EPOCH = 1000


def rate(recipe, iteration, world=1):
    return recipe.lr_at(iteration, PER_EPOCH, world, recipe.batch_size)


def test_published_recipes():
    """The table of the original's two configurations."""
    one, eight = RECIPES["1p"], RECIPES["8p"]
    assert one.base_lr(1, 8) == pytest.approx(2.5e-4)
    assert eight.base_lr(8, 8) == pytest.approx(2e-3)
    for name in ("1p", "8p", "ssd512"):
        recipe = RECIPES[name]
        assert (recipe.batch_size, recipe.epochs, recipe.repeat) == (8, 24, 5)
        assert (recipe.momentum, recipe.weight_decay, recipe.clip_norm) == (0.9, 5e-4, 0)
        assert (recipe.lr_decay_epochs, recipe.warmup, recipe.warmup_ratio) == (
            (16, 22),
            500,
            1e-3,
        )
        assert (recipe.amp, recipe.loss_scale) == ("O1", "128")
        assert recipe.evaluation == tuple(range(1, 25))


def test_the_rate_follows_the_number_of_images():
    assert Recipe().base_lr(4, 16) == pytest.approx(2e-3)
    assert Recipe(lr=1e-3).base_lr(2, 8) == pytest.approx(2.5e-4)


def test_decays_start_with_their_epochs_in_any_order_of_the_flag():
    recipe = Recipe(warmup=0, lr_decay_epochs=(5, 2), lr_decay_factor=0.5)
    found = [rate(recipe, PER_EPOCH * epoch + k) for epoch in (1, 2, 4, 5) for k in (0, 999)]
    base = 2.5e-4
    assert found == pytest.approx([base] * 2 + [base / 2] * 4 + [base / 4] * 2)


def test_warm_up_rises_linearly_to_the_rate():
    recipe = Recipe()
    rates = [rate(recipe, iteration) for iteration in range(502)]
    assert rates[0] == pytest.approx(2.5e-7)
    assert [b - a for a, b in pairwise(rates[:501])] == pytest.approx([0.999 * 2.5e-4 / 500] * 500)
    assert rates[500] == rates[501] == pytest.approx(2.5e-4)


def test_the_listing_names_every_field():
    recipe = RECIPES["1p"]
    lines = dict(line.split(" = ", 1) for line in recipe.listing().split("\n"))
    assert lines == {f.name: repr(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_recipes_of_this_network(name):
    recipe = RECIPES[name]
    levels = len(recipe.anchor_maps)
    assert len(recipe.anchor_sizes) == levels + 1
    assert len(recipe.anchor_strides) == len(recipe.anchor_ratios) == levels
    assert max(recipe.lr_decay_epochs, default=0) < recipe.epochs
