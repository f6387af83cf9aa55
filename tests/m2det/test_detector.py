"""The detector that a user's own program calls."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.npu.weights import LoadReport
from m2det import demo
from m2det.anchors import make_anchors
from m2det.config import RECIPES
from m2det.detector import Detector

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
RECIPE = replace(RECIPES["quickstart"], eval_batch_size=2)
NUM_ANCHORS = len(make_anchors(RECIPE))


class OneBox(nn.Module):
    """Finds one box in each image, and notes how many images come at once."""

    def __init__(self):
        super().__init__()
        self.batch_sizes = []

    def forward(self, images):
        count = len(images)
        self.batch_sizes.append(count)
        logits = torch.zeros(count, NUM_ANCHORS, 2)
        logits[:, :, 0] = 20  # background
        logits[:, 9000, 1] = 40
        return torch.zeros(count, NUM_ANCHORS, 4), logits


def make_detector(recipe=RECIPE):
    report = LoadReport((), (), (), ())
    return Detector(OneBox(), recipe, ("cat",), torch.device("cpu"), report)


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


def test_the_demo_has_a_batch_size_of_its_own(tmp_path, monkeypatch, capsys):
    detectors = []

    def from_checkpoint(state, recipe, device):
        detectors.append(make_detector(recipe))
        return detectors[-1]

    monkeypatch.setattr(demo.Detector, "from_checkpoint", from_checkpoint)
    monkeypatch.setattr(
        demo.flags, "checkpoint_to_use", lambda args, model: {"path": args.checkpoint}
    )
    images = [str(path) for path in sorted((TINY / "val2017").iterdir())[:9]]
    where = [f"--show_dir={tmp_path}", "--device=cpu", "--recipe=quickstart"]
    assert demo.main(["a.pth", *images, *where, "--batch_size=5", "--show"]) == 0
    assert detectors[0].model.batch_sizes == [5, 4]
    output = capsys.readouterr().out
    assert "a.pth: " in output
    assert "9 of 9 images drawn" in output
    assert f"--show has no effect: the pictures will be in {tmp_path}" in output
