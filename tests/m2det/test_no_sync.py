"""A training step neither waits for the device nor has shapes that depend on the data."""

from dataclasses import replace

import pytest
import torch

from benchmarks.loop import TrainingLoop
from common.npu.precision import Precision
from m2det import train
from m2det.config import RECIPES
from m2det.data import build_loader
from tests.scripts import TINY
from tests.watch import assert_equal_steps, watched_steps

CPU = torch.device("cpu")
SMALL = {"backbone": "vgg16_thin", "planes": 16, "num_levels": 2, "lr": 1e-4}


@pytest.fixture(scope="module")
def recipe():
    return replace(RECIPES["320_vgg"], batch_size=2)


@pytest.fixture(scope="module")
def batches(recipe, tiny_train):
    """Steps of two images with different numbers of boxes; the last has none."""
    batches = list(build_loader(recipe, tiny_train, True, seed=3, end=3))
    batches[2] = batches[2]._replace(valid=torch.zeros_like(batches[2].valid))
    assert len({batch.valid.sum().item() for batch in batches}) == 3
    return batches


def training(recipe, precision, **fields):
    flags = [f"--data={TINY}", "--device=cpu", "--kind=perf"]
    return TrainingLoop(train, replace(recipe, **SMALL, **fields), flags, precision)


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
    with training(recipe, precision, clip_norm=10.0, clip_each=1.0) as loop:
        assert_equal_steps(watched_steps(loop, batches))
