"""A training step neither waits for the device nor has shapes that depend on the data."""

from dataclasses import replace

import pytest
import torch

from benchmarks.loop import TrainingLoop
from common.npu import checkpoint
from common.npu.precision import Precision
from fcos import train
from fcos.config import RECIPES
from fcos.data import build_loader, orientation_groups, training_records
from fcos.model import build_model
from tests.scripts import TINY
from tests.watch import assert_equal_steps, watched_steps

CPU = torch.device("cpu")
SMALL = {"backbone": "resnet14", "channels": 64, "tower_convs": 1, "img_scale": ("64,107",)}


def small(name):
    return replace(RECIPES[name], **SMALL, batch_size=2)


@pytest.fixture(scope="module")
def batches(tiny_train):
    """`batches(1)`: steps of two images of an orientation, with different numbers of boxes, the
    last without any."""

    def of(landscape, recipe):
        index = training_records(tiny_train)
        records = index.subset(orientation_groups(index)[landscape])
        batches = list(build_loader(recipe, records, True, seed=2, end=3))
        batches[2] = batches[2]._replace(valid=torch.zeros_like(batches[2].valid))
        assert len({batch.valid.sum().item() for batch in batches}) == 3
        return batches

    return of


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    """Pretrained weights, with which the backbone is frozen in part."""
    path = tmp_path_factory.mktemp("weights") / "resnet14.pth"
    checkpoint.save(path, build_model(small("gn"), 3).backbone.state_dict())
    return path


def training(recipe, precision, *flags):
    where = [f"--data={TINY}", "--device=cpu", "--kind=perf"]
    return TrainingLoop(train, recipe, [*where, *flags], precision)


@pytest.mark.parametrize("landscape", [1, 0])
@pytest.mark.parametrize(("name", "level"), [("gn", "O0"), ("gn", "O1"), ("tricks", "O1")])
def test_a_step_waits_for_nothing(batches, backbone_file, name, level, landscape):
    recipe = small(name)
    of_orientation = batches(landscape, recipe)
    shapes = {batch.images.shape[1:3] for batch in of_orientation}
    assert shapes == {(64, 128) if landscape else (128, 64)}
    with training(recipe, Precision(CPU, level), f"--pretrained={backbone_file}") as loop:
        assert_equal_steps(watched_steps(loop, of_orientation))


def test_a_new_network_without_pretrained_weights(batches):
    recipe = small("nogn")
    with training(recipe, Precision(CPU)) as loop:
        assert_equal_steps(watched_steps(loop, batches(1, recipe)))


def test_a_step_with_static_scale(batches, backbone_file):
    recipe = small("gn")
    precision = Precision(CPU, "O1")
    precision.static_scale = 32.0
    with training(recipe, precision, f"--pretrained={backbone_file}") as loop:
        assert_equal_steps(watched_steps(loop, batches(1, recipe)))


def test_a_dynamic_scale_reads_one_flag_at_most(batches, backbone_file):
    recipe = small("gn")
    precision = Precision(CPU)
    precision.scaler = torch.amp.GradScaler("cpu")
    with training(recipe, precision, f"--pretrained={backbone_file}") as loop:
        assert_equal_steps(watched_steps(loop, batches(0, recipe), allowed=1))
