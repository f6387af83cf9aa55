"""ssd_mmdet on a simulated Ascend 910A, which sorts in half precision: golden results."""

import pytest

from tests.simulated_npu.ssd_mmdet.test_golden import real  # noqa: F401
from tests.ssd_mmdet.test_golden import test_detections, test_targets  # noqa: F401

pytestmark = [pytest.mark.npu_sim, pytest.mark.usefixtures("sorts_in_half", "on_npu")]
