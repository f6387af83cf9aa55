"""What the tests of the TFRecord recipe share: the golden files and one thread."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_resnet34.tfrecord.config import RECIPES
from ssd_resnet34.tfrecord.model import build_model
from ssd_resnet34.tfrecord.weights import tensorflow_names
from tests.golden.fill import fill_value
from tests.golden_files import golden_reader

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "ssd_resnet34_tfrecord"
TINY = TESTS / "data" / "tiny_coco"


@pytest.fixture(scope="session")
def golden():
    """`golden("loss")`: the arrays of loss.npz; `golden("lr")`: the contents of lr.json."""
    return golden_reader("ssd_resnet34_tfrecord")


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_dir():
    return TINY


@pytest.fixture(scope="session")
def recipe():
    return RECIPES["port"]


@pytest.fixture(scope="session")
def filled_state(golden, recipe):
    """The state dict that every golden value was computed with, by the golden README's rule."""
    names = tensorflow_names(build_model(recipe, 80))
    entries = {entry["checkpoint_name"]: entry for entry in golden("mapping")}

    def value(name):
        key = entries[name]["fill_key"]
        array = fill_value(key, tuple(entries[name]["torch_shape"]))
        if key.endswith("bn2.weight"):
            array = array * np.float32(0.2)
        return torch.from_numpy(array)

    return {key: value(name) for key, name in names.items()}


@pytest.fixture
def filled_model(recipe, filled_state):
    """A network filled so, in evaluation mode."""
    model = build_model(recipe, 80)
    missing, unexpected = model.load_state_dict(filled_state, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing)
    assert not unexpected
    return model.eval()
