"""What the tests of fcos share: the golden files, the filled networks, real data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.npu.selfcheck import Golden
from fcos.config import RECIPES
from fcos.model import build_model
from fcos.selfcheck import value_of
from tests.golden_files import golden_reader

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "fcos"
TINY = TESTS / "data" / "tiny_coco"


@pytest.fixture(scope="session")
def recipe():
    return RECIPES["gn"]


@pytest.fixture(scope="session")
def golden():
    """`golden("loss")`: the arrays of loss.npz; `golden("lr")`: the contents of lr.json."""
    return golden_reader("fcos")


@pytest.fixture(scope="session")
def filled_state(golden):
    """`filled_state("gn")`: the state dict of the golden values, by the golden README's rule."""

    files = Golden("fcos")

    def value(key, shape):
        return torch.from_numpy(np.asarray(value_of(key, tuple(shape), files)))

    def state(name):
        keys = golden("keys" if name == "gn" else f"keys_{name}")
        return {key: value(key, shape) for key, shape in keys}

    return state


@pytest.fixture(scope="session")
def filled_model(filled_state):
    """`filled_model("gn")`: the filled network as pretrained ones are used, frozen in part, in
    evaluation mode."""

    def model(name):
        network = build_model(RECIPES[name], 80)
        network.load_state_dict(filled_state(name))
        network.backbone.freeze()
        return network.eval()

    return model


@pytest.fixture(scope="session")
def real_truth(golden):
    """`real_truth("256x320")`: padded boxes, 0-based labels and validity (2, 32, ...) of the
    golden's two training images at that scale."""

    def truth(scale):
        expected = golden("targets")
        boxes, labels = torch.zeros(2, 32, 4), torch.zeros(2, 32, dtype=torch.int64)
        valid = torch.zeros(2, 32, dtype=torch.bool)
        for i in (0, 1):
            given = torch.from_numpy(expected[f"{scale}.gt_bboxes.{i}"])
            boxes[i, : len(given)] = given
            labels[i, : len(given)] = torch.from_numpy(expected[f"{scale}.gt_labels.{i}"]).long()
            valid[i, : len(given)] = True
        return boxes, labels, valid

    return truth
