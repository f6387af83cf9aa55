"""The TFRecord recipe on a simulated Ascend 910A, which sorts in half precision: golden results."""

import pytest

from tests.simulated_npu.ssd_resnet34_tfrecord.test_golden import (  # noqa: F401
    cpu_outputs,
    cpu_truth,
    raw_outputs,
    truth,
)
from tests.ssd_resnet34_tfrecord.test_golden import test_detections, test_targets  # noqa: F401

pytestmark = [pytest.mark.npu_sim, pytest.mark.usefixtures("sorts_in_half", "on_npu")]
