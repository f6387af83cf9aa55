"""The golden files of the TFRecord recipe again, computed on the simulated NPU."""

import pytest

from tests.ssd_resnet34_tfrecord import test_golden
from tests.ssd_resnet34_tfrecord.test_golden import (  # noqa: F401
    test_decoded_boxes_and_best_scores,
    test_detections,
    test_forward,
    test_loss_and_gradients,
    test_targets,
)

pytestmark = [pytest.mark.npu_sim, pytest.mark.usefixtures("on_npu")]
cpu_truth = test_golden.truth
cpu_outputs = test_golden.raw_outputs


@pytest.fixture
def filled_model(npu, filled_model):
    return filled_model.to(npu)


@pytest.fixture
def truth(npu, cpu_truth):
    return [part.to(npu) for part in cpu_truth]


@pytest.fixture
def raw_outputs(npu, cpu_outputs):
    return [part.to(npu) for part in cpu_outputs]
