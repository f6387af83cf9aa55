"""The golden files of m2det again, computed on the simulated NPU."""

import copy

import pytest

from tests.m2det import test_golden
from tests.m2det.test_golden import (  # noqa: F401
    test_detections,
    test_loss_and_gradients,
    test_targets,
)

pytestmark = [pytest.mark.npu_sim, pytest.mark.usefixtures("on_npu")]


@pytest.fixture
def filled_model(npu, filled_model):
    return lambda name, **fields: copy.deepcopy(filled_model(name, **fields)).to(npu)


def test_forward(golden, filled_model):
    """The smallest of the golden networks."""
    test_golden.test_forward(golden, filled_model, "m2det320_vgg_sfam")
