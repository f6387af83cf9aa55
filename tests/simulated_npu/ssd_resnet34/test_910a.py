"""ssd_resnet34 on a simulated Ascend 910A, which sorts in half precision: golden results."""

import pytest

from tests.ssd_resnet34.test_golden import test_detections, test_targets  # noqa: F401

pytestmark = [pytest.mark.npu_sim, pytest.mark.usefixtures("sorts_in_half", "on_npu")]
