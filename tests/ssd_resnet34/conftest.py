"""What the tests of ssd_resnet34 share: the golden files, the filled network, real data."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.npu.selfcheck import Golden
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import normalise
from ssd_resnet34.model import build_model
from ssd_resnet34.selfcheck import value_of
from tests.golden_files import golden_reader

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "ssd_resnet34"
TINY = TESTS / "data" / "tiny_coco"


@pytest.fixture(scope="session")
def recipe():
    return RECIPES["1p"]


@pytest.fixture(scope="session")
def golden():
    """`golden("loss")`: the arrays of loss.npz; `golden("lr")`: the contents of lr.json."""
    return golden_reader("ssd_resnet34")


@pytest.fixture(scope="session")
def filled_state(golden):
    """The state dict that every golden value was computed with, by the golden README's rule."""

    files = Golden("ssd_resnet34")
    return {
        key: torch.from_numpy(value_of(key, tuple(shape), files)) for key, shape in golden("keys")
    }


@pytest.fixture(scope="session")
def filled_model(recipe, filled_state):
    """The filled network in evaluation mode; whoever changes it takes a copy."""
    model = build_model(recipe, 80)
    model.load_state_dict(filled_state)
    return model.eval()


@pytest.fixture(scope="session")
def real(golden, tiny_val, recipe):
    """The golden's two real images: positions in tiny_val, and their input as Pillow resizes it."""
    ids = golden("preprocess")["image_id"]
    records = [int(np.flatnonzero(tiny_val.image_ids == image_id)[0]) for image_id in ids]
    size = (recipe.image_size, recipe.image_size)
    images = [
        np.array(
            Image.open(tiny_val.path(k)).convert("RGB").resize(size, Image.Resampling.BILINEAR)
        )
        for k in records
    ]
    inputs = normalise(torch.from_numpy(np.stack(images)), recipe)
    return SimpleNamespace(records=records, inputs=inputs)


@pytest.fixture(scope="session")
def real_truth(golden):
    """Padded boxes, 0-based labels and validity (3, 32, ...): real images 0 and 1, then nothing."""
    boxes, labels = torch.zeros(3, 32, 4), torch.zeros(3, 32, dtype=torch.int64)
    valid = torch.zeros(3, 32, dtype=torch.bool)
    for i in (0, 1):
        given = torch.from_numpy(golden("targets")[f"{i}.boxes_ltrb"])
        boxes[i, : len(given)] = given
        labels[i, : len(given)] = torch.from_numpy(golden("targets")[f"{i}.labels"]).long() - 1
        valid[i, : len(given)] = True
    return boxes, labels, valid
