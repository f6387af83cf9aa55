"""A training step neither waits for the device nor has shapes that depend on the data."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.npu.distributed import Ranks
from common.npu.precision import Precision
from ssd_mmdet import train
from ssd_mmdet.data import build_loader, training_records
from tests.watch import Watch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches(recipe, tiny_train):
    """Steps of two images with different numbers of boxes; the last has none."""
    recipe = replace(recipe, batch_size=2)
    found = list(build_loader(recipe, training_records(tiny_train), True, seed=2, end=3))
    found[2] = found[2]._replace(valid=torch.zeros_like(found[2].valid))
    assert len({batch.valid.sum().item() for batch in found}) == 3
    return found


def training(recipe, tiny_train, precision, **fields):
    recipe = replace(recipe, width=1 / 16, batch_size=2, **fields)
    log = SimpleNamespace(info=lambda text: None)
    records = training_records(tiny_train)
    torch.manual_seed(0)
    args = train.parse([])
    return train.Training(args, recipe, CPU, Ranks(), precision, log, records, records)


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


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_a_step_waits_for_nothing(recipe, tiny_train, batches, level):
    run = training(recipe, tiny_train, Precision(CPU, level))
    calls = watched_steps(run, batches)
    assert_equal_steps(calls)
    names = {name for name, *_ in calls[0]}
    assert {"aten::convolution_backward", "aten::_fused_sgd_"} <= names
    inputs = {given[0][0] for name, *given in calls[0] if name == "aten::convolution"}
    assert inputs == {torch.bfloat16 if level == "O1" else torch.float32}


def test_a_step_with_static_scale_and_clipping_as_on_an_accelerator(recipe, tiny_train, batches):
    precision = Precision(CPU, "O1")
    precision.static_scale = 128.0
    run = training(recipe, tiny_train, precision, clip_norm=10.0)
    assert_equal_steps(watched_steps(run, batches))


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
def test_a_dynamic_scale_reads_one_flag_at_most(recipe, tiny_train, batches, clip_norm):
    precision = Precision(CPU)
    precision.scaler = torch.amp.GradScaler("cpu")
    run = training(recipe, tiny_train, precision, clip_norm=clip_norm)
    assert_equal_steps(watched_steps(run, batches, allowed=1))
