"""The detector that a user's own program calls."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from common.npu.weights import LoadReport
from ssd_resnet34.anchors import make_anchors
from ssd_resnet34.config import RECIPES
from ssd_resnet34.detector import Detector

RECIPE = replace(RECIPES["1p"], eval_batch_size=2)
NUM_ANCHORS = len(make_anchors(RECIPE))


class OneBox(nn.Module):
    """Finds one box in each image, and notes how many images come at once."""

    def __init__(self):
        super().__init__()
        self.batch_sizes = []

    def forward(self, images):
        count = len(images)
        self.batch_sizes.append(count)
        logits = torch.zeros(count, 2, NUM_ANCHORS)
        logits[:, 0] = 20  # background
        logits[:, 1, 6000] = 40
        return torch.zeros(count, 4, NUM_ANCHORS), logits


def make_detector():
    report = LoadReport((), (), (), ())
    return Detector(OneBox(), RECIPE, ("cat",), torch.device("cpu"), report)


def test_no_image_has_no_detections():
    detector = make_detector()
    assert detector([]) == []
    assert detector.detect_batch([]) == []
    assert detector.model.batch_sizes == []


def test_a_long_list_goes_through_the_network_in_batches():
    detector = make_detector()
    images = [np.zeros((10, 20 * number, 3), np.uint8) for number in range(1, 6)]
    found = detector(images)
    assert detector.model.batch_sizes == [2, 2, 1]
    assert len(found) == 5
    for image, detections in zip(images, found, strict=True):
        alone = detector(image)
        assert len(alone.scores) == 1
        assert torch.equal(detections.boxes, alone.boxes)
