"""A training step neither waits for the device nor has shapes that depend on the data."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from common.npu.precision import Precision, build_sgd
from m2det import augment, loss
from m2det.config import RECIPES
from m2det.data import build_loader
from m2det.loss import DetectionLoss
from m2det.model import build_model
from tests.watch import Watch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe():
    return replace(RECIPES["320_vgg"], batch_size=2)


@pytest.fixture(scope="module")
def batches(recipe, tiny_train):
    """Steps of two images with different numbers of boxes; the last has none."""
    found = list(build_loader(recipe, tiny_train, True, seed=3, end=3))
    found[2] = found[2]._replace(valid=torch.zeros_like(found[2].valid))
    assert len({batch.valid.sum().item() for batch in found}) == 3
    return found


def watched_steps(recipe, precision, batches, allowed=0):
    """The operations of each step but the first, which makes the optimizer's state."""
    torch.manual_seed(0)
    recipe = replace(recipe, backbone="vgg16_thin", planes=16, num_levels=2)
    model, criterion = build_model(recipe, 80), DetectionLoss(recipe, 80)
    optimizer = build_sgd(list(model.parameters()), CPU, lr=1e-4, momentum=0.9, weight_decay=5e-4)
    calls = []
    for number, batch in enumerate(batches):
        with Watch(allowed if number else 10**9) as watch:
            optimizer.zero_grad(set_to_none=True)
            images, boxes = augment.augment(batch.to(CPU), recipe)
            with precision.autocast():
                outputs = model(images)
            losses = criterion(outputs, boxes, batch.labels, batch.valid)
            precision.backward(losses["loss"], optimizer)
            precision.step(optimizer, recipe.clip_norm, recipe.clip_each)
        calls.append(watch.calls)
    return calls[1:]


def assert_equal_steps(calls):
    """The same operations on the same shapes in the same order, whatever the boxes."""
    assert len(calls[0]) > 500
    for later in calls[1:]:
        assert Counter(later) == Counter(calls[0])
        assert later == calls[0]


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_a_step_waits_for_nothing(recipe, batches, level):
    calls = watched_steps(recipe, Precision(CPU, level), batches)
    assert_equal_steps(calls)
    names = {name for name, *_ in calls[0]}
    assert {"aten::convolution_backward", "aten::_fused_sgd_"} <= names
    inputs = {given[0][0] for name, *given in calls[0] if name == "aten::convolution"}
    assert inputs == {torch.bfloat16 if level == "O1" else torch.float32}


def test_a_step_with_static_scale_and_clipping_as_on_an_accelerator(recipe, batches, monkeypatch):
    # There the whole batch goes through at once, and gradients are scaled.
    for module in (augment, loss):
        monkeypatch.setattr(module, "chunk_size", len)
    precision = Precision(CPU, "O1")
    precision.static_scale = 128.0
    clipped = replace(recipe, clip_norm=10.0, clip_each=1.0)
    assert_equal_steps(watched_steps(clipped, precision, batches))
