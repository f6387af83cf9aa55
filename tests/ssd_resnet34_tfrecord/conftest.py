"""What the tests of the TFRecord recipe share: the golden files and one thread."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "ssd_resnet34_tfrecord"
TINY = TESTS / "data" / "tiny_coco"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the golden values were computed; also far quicker on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden():
    """`golden("loss")`: the arrays of loss.npz; `golden("lr")`: the contents of lr.json."""

    @functools.cache
    def read(name):
        path = GOLDEN / f"{name}.npz"
        if path.exists():
            return dict(np.load(path))
        return json.loads((GOLDEN / f"{name}.json").read_text())

    return read


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_dir():
    return TINY
