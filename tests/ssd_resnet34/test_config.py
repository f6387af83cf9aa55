import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_resnet34.config import RECIPES, Recipe

PER_EPOCH = 100
# What the preset for finetuning has of its own.
SCHEDULE = ("lr_step", "lr_decay_epochs", "lr_decay_at", "evaluation", "eval_interval")


def rate(recipe, iteration, world=1):
    return recipe.lr_at(iteration, PER_EPOCH, world, recipe.batch_size)


def test_published_recipes():
    """The table of the original's launch scripts."""
    one, eight, fine = (RECIPES[name] for name in ("1p", "8p", "finetune"))
    assert one.base_lr(1, 32) == pytest.approx(0.0025)
    assert eight.base_lr(8, 32) == pytest.approx(0.025)
    assert (one.weight_decay, eight.weight_decay) == (5e-4, 7.5e-4)
    assert (one.loss_scale, eight.loss_scale) == ("128", "32")
    assert (one.lr_decay_epochs, eight.lr_decay_epochs) == ((44, 55), (45, 58, 84))
    assert one.evaluation == (40, 50, 55, 60, 65, 70, 75, 80, 85)
    assert eight.evaluation == (60, 65, 70, 75, 80, 85)
    assert {(r.epochs, r.batch_size, r.warmup) for r in (one, eight, fine)} == {(90, 32, 0)}
    assert {r.threshold for r in (one, eight)} == {0.23}
    changed = {field: getattr(one, field) for field in SCHEDULE}
    assert dataclasses.replace(fine, threshold=0.23, **changed) == one


@settings(max_examples=50, deadline=None)
@given(world=st.integers(1, 64), batch=st.integers(1, 128), lr=st.floats(1e-4, 1e-2))
def test_base_rate_is_a_multiple_of_its_step_near_the_linear_rule(world, batch, lr):
    recipe = Recipe(lr=lr)
    base, linear = recipe.base_lr(world, batch), lr * world * batch / 32
    steps = base / 2.5e-3
    assert steps == pytest.approx(round(steps))
    assert steps >= 1
    assert abs(base - linear) <= 1.25e-3 * (1 + 1e-9) or base == 2.5e-3
    free = dataclasses.replace(recipe, lr_step=0)
    assert free.base_lr(world, batch) == pytest.approx(linear)


def test_halves_round_to_even():
    assert Recipe(lr=2.5e-3).base_lr(1, 80) == pytest.approx(2 * 2.5e-3)
    assert Recipe(lr=2.5e-3).base_lr(1, 112) == pytest.approx(4 * 2.5e-3)


def test_decays_start_with_their_epochs_in_any_order_of_the_flag():
    recipe = Recipe(lr=2.5e-3, lr_decay_epochs=(5, 2), lr_decay_factor=0.5)
    found = [rate(recipe, PER_EPOCH * epoch + k) for epoch in (1, 2, 4, 5) for k in (0, 99)]
    assert found == pytest.approx([0.0025] * 2 + [0.00125] * 4 + [0.000625] * 2)


@pytest.mark.parametrize(("factor", "first"), [(0, 0.0), (1, 0.5), (2, 0.75)])
def test_warm_up_rises_to_just_below_the_base_and_stays_there_until_a_decay(factor, first):
    recipe = Recipe(lr=2.5e-3, warmup=40, warmup_factor=factor, lr_decay_epochs=(1,))
    base = recipe.base_lr(1, 32)
    rates = [rate(recipe, iteration) for iteration in range(2 * PER_EPOCH)]
    assert rates[0] == pytest.approx(first * base)
    steps = [b - a for a, b in pairwise(rates[:40])]
    assert steps == pytest.approx([(1 - first) * base / 40] * 39)
    assert set(rates[39:PER_EPOCH]) == {rates[39]}
    assert rates[39] == pytest.approx(base * (1 - (1 - first) / 40))
    assert rates[PER_EPOCH:] == pytest.approx([0.1 * base] * PER_EPOCH)


def test_a_warm_up_past_a_decay_uses_the_decayed_rate():
    recipe = Recipe(lr=2.5e-3, warmup=2 * PER_EPOCH, warmup_factor=0, lr_decay_epochs=(1,))
    assert rate(recipe, PER_EPOCH) == pytest.approx(0.1 * 0.0025 * 0.5)


def test_the_listing_names_every_field():
    recipe = RECIPES["quickstart"]
    lines = dict(line.split(" = ", 1) for line in recipe.listing().split("\n"))
    assert lines == {f.name: repr(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_recipes_of_this_network(name):
    recipe = RECIPES[name]
    levels = len(recipe.anchor_maps)
    assert len(recipe.anchor_sizes) == levels + 1
    assert len(recipe.anchor_steps) == len(recipe.anchor_ratios) == levels
    assert max((*recipe.evaluation, *recipe.lr_decay_epochs), default=0) < recipe.epochs
