"""The golden files of ssd_mmdet again, computed on the simulated NPU."""

import copy
from types import SimpleNamespace

import pytest

from tests.ssd_mmdet.test_golden import (  # noqa: F401
    test_detections,
    test_forward,
    test_loss_and_gradients,
    test_targets,
)

pytestmark = [pytest.mark.npu_sim, pytest.mark.usefixtures("filled_model", "real", "on_npu")]


@pytest.fixture
def filled_model(npu, filled_model):
    return copy.deepcopy(filled_model).to(npu)


@pytest.fixture
def real(npu, real):
    return SimpleNamespace(truth=[part.to(npu) for part in real.truth])
