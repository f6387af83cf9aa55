"""What the tests of ssd_mmdet share: the golden files, the filled network, real data."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.coco.images import read_image
from common.npu.selfcheck import Golden
from ssd_mmdet.config import RECIPES
from ssd_mmdet.model import build_model
from ssd_mmdet.selfcheck import value_of
from tests.golden_files import golden_reader
from tests.ssd_mmdet import reference

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "ssd_mmdet"
TINY = TESTS / "data" / "tiny_coco"


@pytest.fixture(scope="session")
def recipe():
    return RECIPES["1p"]


@pytest.fixture(scope="session")
def golden():
    """`golden("loss.npz")`: the arrays of that file; `golden("lr.json")`: its contents."""
    return golden_reader("ssd_mmdet")


def filled_value(key, shape):
    """The value that every golden figure was computed with, by the golden README's rule."""
    return torch.from_numpy(value_of(key, tuple(shape), Golden("ssd_mmdet")))


@pytest.fixture(scope="session")
def filled_state(golden):
    return {key: filled_value(key, shape) for key, shape in golden("keys.json")}


@pytest.fixture(scope="session")
def filled_model(recipe, filled_state):
    """The filled network in evaluation mode; whoever changes it takes a copy."""
    model = build_model(recipe, 80)
    model.load_state_dict(filled_state)
    return model.eval()


def record_of(index, file_name):
    return index.file_names.tolist().index(file_name.encode())


@pytest.fixture(scope="session")
def real(golden, tiny_train):
    """The golden's two training images: network input, and padded boxes, labels and validity
    (3, 32, ...), of which the third image has none."""
    names = ("000000184613.jpg", "000000391895.jpg")
    images = [read_image(tiny_train.path(record_of(tiny_train, name))) for name in names]
    inputs = torch.stack([reference.network_input(image.astype(np.float32)) for image in images])
    boxes, labels = torch.zeros(3, 32, 4), torch.zeros(3, 32, dtype=torch.int64)
    valid = torch.zeros(3, 32, dtype=torch.bool)
    for i in (0, 1):
        given = torch.from_numpy(golden("targets.npz")[f"gt_boxes{i}"])
        boxes[i, : len(given)] = given
        labels[i, : len(given)] = torch.from_numpy(golden("targets.npz")[f"gt_labels{i}"])
        valid[i, : len(given)] = True
    return SimpleNamespace(inputs=inputs, truth=(boxes, labels, valid))
