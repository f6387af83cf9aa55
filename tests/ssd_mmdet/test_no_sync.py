"""A training step neither waits for the device nor has shapes that depend on the data."""

from dataclasses import replace

import pytest
import torch

from benchmarks.loop import TrainingLoop
from common.npu.precision import Precision
from ssd_mmdet import train
from ssd_mmdet.data import build_loader, training_records
from tests.scripts import TINY
from tests.watch import assert_equal_steps, watched_steps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches(recipe, tiny_train):
    """Steps of two images with different numbers of boxes; the last has none."""
    recipe = replace(recipe, batch_size=2)
    batches = list(build_loader(recipe, training_records(tiny_train), True, seed=2, end=3))
    batches[2] = batches[2]._replace(valid=torch.zeros_like(batches[2].valid))
    assert len({batch.valid.sum().item() for batch in batches}) == 3
    return batches


def training(recipe, precision, **fields):
    recipe = replace(recipe, width=1 / 16, batch_size=2, **fields)
    flags = [f"--data={TINY}", "--device=cpu", "--kind=perf"]
    return TrainingLoop(train, recipe, flags, precision)


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_a_step_waits_for_nothing(recipe, batches, level):
    with training(recipe, Precision(CPU, level)) as loop:
        calls = watched_steps(loop, batches)
    assert_equal_steps(calls)
    names = {name for name, *_ in calls[0]}
    assert {"aten::convolution_backward", "aten::_fused_sgd_"} <= names
    inputs = {tensors[0][0] for name, *tensors in calls[0] if name == "aten::convolution"}
    assert inputs == {torch.bfloat16 if level == "O1" else torch.float32}


def test_a_step_with_static_scale_and_clipping(recipe, batches):
    precision = Precision(CPU, "O1")
    precision.static_scale = 128.0
    with training(recipe, precision, clip_norm=10.0) as loop:
        assert_equal_steps(watched_steps(loop, batches))


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
def test_a_dynamic_scale_reads_one_flag_at_most(recipe, batches, clip_norm):
    precision = Precision(CPU)
    precision.scaler = torch.amp.GradScaler("cpu")
    with training(recipe, precision, clip_norm=clip_norm) as loop:
        assert_equal_steps(watched_steps(loop, batches, allowed=1))
