"""The golden files of fcos again, computed on the simulated NPU."""

import pytest

from tests.fcos.test_golden import (  # noqa: F401
    test_detections,
    test_forward,
    test_loss_and_gradients,
    test_targets,
)

pytestmark = [pytest.mark.npu_sim, pytest.mark.usefixtures("on_npu")]
