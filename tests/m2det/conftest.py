"""What the tests of m2det share: the golden files, filled networks, real data."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.npu.selfcheck import Golden
from m2det.config import RECIPES
from m2det.model import build_model
from m2det.selfcheck import ALIASES, value_of
from tests.golden_files import golden_reader

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "m2det"
TINY = TESTS / "data" / "tiny_coco"


@pytest.fixture(scope="session")
def recipe():
    return RECIPES["512_vgg"]


@pytest.fixture(scope="session")
def golden():
    """`golden("loss")`: the arrays of loss.npz; `golden("lr")`: the contents of lr.json."""
    return golden_reader("m2det")


@functools.cache
def filled(key, shape):
    """The value that every golden number was computed with, by the golden README's rules."""
    return torch.from_numpy(value_of(key, shape, Golden("m2det")))


def fill(model):
    """The model, made on the meta device, with golden values and in evaluation mode.

    Models share the values: whoever changes one takes a copy.
    """
    state = {
        key: filled(ALIASES.sub(r"\1.0", key), tuple(value.shape))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


@pytest.fixture(scope="session")
def filled_model():
    """`filled_model("320_vgg", sfam=True)`."""

    @functools.cache
    def make(name, **fields):
        with torch.device("meta"):
            model = build_model(replace(RECIPES[name], **fields), 80)
        return fill(model)

    return make


def pad(truths, slots=48):
    """Boxes (N, M, 4), 0-based labels and validity (N, M) of golden rows x1 y1 x2 y2 label.

    Label 0 marks the row that the original makes up for an image without objects: left out here.
    """
    boxes, labels = torch.zeros(len(truths), slots, 4), torch.zeros(len(truths), slots).long()
    valid = torch.zeros(len(truths), slots, dtype=torch.bool)
    for n, truth in enumerate(truths):
        rows = torch.from_numpy(truth[truth[:, 4] > 0])
        boxes[n, : len(rows)] = rows[:, :4]
        labels[n, : len(rows)] = rows[:, 4].long() - 1
        valid[n, : len(rows)] = True
    return boxes, labels, valid
