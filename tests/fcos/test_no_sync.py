"""A training step neither waits for the device nor has shapes that depend on the data."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.npu.distributed import Ranks
from common.npu.precision import Precision
from fcos import loss, train
from fcos.config import RECIPES
from fcos.data import build_loader, orientation, training_records
from tests.watch import Watch

CPU = torch.device("cpu")
SMALL = {"backbone": "resnet14", "channels": 64, "tower_convs": 1, "img_scale": ("64,107",)}


def small(name, **fields):
    return replace(RECIPES[name], **SMALL, batch_size=2, **fields)


@pytest.fixture(scope="module")
def batches(tiny_train):
    """`batches(1)`: steps of two images of an orientation, with different numbers of boxes, the
    last without any."""

    def of(lying, recipe):
        index = training_records(tiny_train)
        records = index.subset(orientation(index) == lying)
        found = list(build_loader(recipe, records, True, seed=2, end=3))
        found[2] = found[2]._replace(valid=torch.zeros_like(found[2].valid))
        assert len({batch.valid.sum().item() for batch in found}) == 3
        return found

    return of


def training(recipe, tiny_train, precision, frozen=True):
    args = train.parse([])
    log = SimpleNamespace(info=lambda text: None)
    records = training_records(tiny_train)
    torch.manual_seed(0)
    run = train.Training(args, recipe, CPU, Ranks(), precision, log, records, records)
    if frozen:
        run.model.backbone.freeze()
    return run


def watched_steps(run, batches, allowed=0):
    """The operations of each step but the first, which makes the optimizer's state."""
    run.step(batches[0])
    calls = []
    for batch in batches[1:]:
        with Watch(allowed) as watch:
            run.step(batch)
        calls.append(watch.calls)
    assert run.iteration == len(batches)
    return calls


def assert_equal_steps(calls):
    """The same operations on the same shapes in the same order, whatever the boxes."""
    assert len(calls[0]) > 500
    for later in calls[1:]:
        assert Counter(later) == Counter(calls[0])
        assert later == calls[0]


@pytest.mark.parametrize("lying", [1, 0])
@pytest.mark.parametrize(("name", "level"), [("gn", "O0"), ("gn", "O1"), ("tricks", "O1")])
def test_a_step_waits_for_nothing(tiny_train, batches, name, level, lying):
    recipe = small(name)
    run = training(recipe, tiny_train, Precision(CPU, level))
    found = batches(lying, recipe)
    assert {batch.images.shape[1:3] for batch in found} == {(64, 128) if lying else (128, 64)}
    assert_equal_steps(watched_steps(run, found))


def test_a_new_network_without_pretrained_weights(tiny_train, batches):
    recipe = small("nogn")
    run = training(recipe, tiny_train, Precision(CPU), frozen=False)
    assert_equal_steps(watched_steps(run, batches(1, recipe)))


def test_a_step_with_static_scale_as_on_an_accelerator(tiny_train, batches, monkeypatch):
    # There the whole batch goes through at once, and gradients are scaled.
    monkeypatch.setattr(loss, "chunk_size", len)
    recipe, precision = small("gn"), Precision(CPU, "O1")
    precision.static_scale = 32.0
    run = training(recipe, tiny_train, precision)
    assert_equal_steps(watched_steps(run, batches(1, recipe)))


def test_a_dynamic_scale_reads_one_flag_at_most(tiny_train, batches):
    recipe, precision = small("gn"), Precision(CPU)
    precision.scaler = torch.amp.GradScaler("cpu")
    run = training(recipe, tiny_train, precision)
    assert_equal_steps(watched_steps(run, batches(0, recipe), allowed=1))
