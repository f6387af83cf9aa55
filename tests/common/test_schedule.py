"""Schedules that follow the length of a run, alone and in the presets for finetuning."""

import importlib
from dataclasses import replace
from itertools import groupby

import pytest

from common.schedule import DECAYS, decays_done, evaluation_interval, limited_warmup

MODELS = ("ssd_mmdet", "ssd_resnet34", "m2det", "fcos")


def finetune(model, **changes):
    return replace(importlib.import_module(f"{model}.config").RECIPES["finetune"], **changes)


def test_decays_and_warm_up_are_parts_of_the_run():
    decays = [decays_done(DECAYS, iteration, 18) for iteration in range(18)]
    assert decays == [0] * 12 + [1] * 4 + [2] * 2
    assert decays_done(DECAYS, 0, 1) == 0
    assert limited_warmup(500, 9000) == 500
    assert limited_warmup(500, 160) == 16
    assert limited_warmup(0, 9000) == 0


@pytest.mark.parametrize(
    ("asked", "evaluation", "epochs", "interval"),
    [(0, (), 80, 0), (3, (5,), 80, 3), (-1, (), 80, 8), (-1, (), 4, 1), (-1, (5,), 80, 0)],
)
def test_a_run_has_about_ten_evaluations(asked, evaluation, epochs, interval):
    assert evaluation_interval(asked, evaluation, epochs) == interval


@pytest.mark.parametrize("epochs", [9, 80, 100])
@pytest.mark.parametrize("per_epoch", [1, 2, 300])
@pytest.mark.parametrize("model", MODELS)
def test_finetuning_decays_at_the_same_parts_of_any_run(model, per_epoch, epochs):
    recipe = finetune(model, epochs=epochs)
    total = epochs * per_epoch
    rates = []
    for iteration in range(total // 10, total):  # after the warm-up
        rate = recipe.lr_at(iteration, per_epoch, 1, recipe.batch_size)
        rates.append(rate)
    stages = [(rate, len(list(group))) for rate, group in groupby(rates)]
    lengths = [length for _, length in stages]
    first = round(2 / 3 * total)
    second = round(8 / 9 * total)
    assert lengths == [first - total // 10, second - first, total - second]
    highest = stages[0][0]
    assert [rate / highest for rate, _ in stages] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("model", MODELS)
def test_finetuning_takes_the_rate_as_it_is(model):
    recipe = finetune(model, lr=1.234e-3)
    rates = set()
    for batch_size in (4, 5):
        rates.add(recipe.lr_at(recipe.epochs * 100 // 2, 100, 1, batch_size) / batch_size)
    if model == "m2det":  # its rate is the same for all batches
        assert recipe.lr_at(recipe.epochs * 50, 100, 1, 4) == 1.234e-3
    else:
        assert len({round(rate, 12) for rate in rates}) == 1


@pytest.mark.parametrize("model", MODELS)
def test_named_epochs_take_the_place_of_the_parts(model):
    field = "lr_last_epochs" if model == "m2det" else "lr_decay_epochs"
    recipe = finetune(model, epochs=20, **{field: (10, 20)})
    rates = [recipe.lr_at(step, 100, 1, recipe.batch_size) for step in (999, 1000, 1999)]
    assert rates[1] == rates[2] == pytest.approx(rates[0] / 10)


def test_an_epoch_of_finetuning_is_one_pass():
    for model in MODELS:
        assert finetune(model).repeat == 1
    rest = importlib.import_module("ssd_mmdet.config").RECIPES["1p"]
    assert finetune("ssd_mmdet").epochs == rest.epochs * rest.repeat
