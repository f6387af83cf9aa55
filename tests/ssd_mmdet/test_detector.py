"""The detector as a user's program calls it."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from common.npu import checkpoint
from ssd_mmdet import demo
from ssd_mmdet.config import RECIPES
from ssd_mmdet.data import prepare_image
from ssd_mmdet.detector import Detector
from ssd_mmdet.model import build_model
from ssd_mmdet.postprocess import detect
from tests.scripts import TINY

RECIPE = replace(RECIPES["1p"], width=1 / 16, eval_batch_size=3)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    weights = build_model(RECIPE, 3).state_dict()
    return {"model": weights, "recipe": asdict(RECIPE), "classes": ["cat", "dog", "cow"]}


@pytest.fixture(scope="module")
def detector(state):
    return Detector.from_checkpoint(state, RECIPE, torch.device("cpu"))


def pictures(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 7 * k, 60, 3), dtype=np.uint8) for k in range(count)]


def test_no_image_has_no_detections(detector):
    assert detector([]) == []


def test_no_more_images_than_fit_go_through_the_network_at_once(detector):
    batches = []
    handle = detector.model.register_forward_pre_hook(
        lambda module, args: batches.append(len(args[0]))
    )
    detections = detector(pictures(7))
    handle.remove()
    assert batches == [3, 3, 1]
    assert len(detections) == 7


def test_the_demo_has_a_batch_size_of_its_own(state, tmp_path, monkeypatch, capsys):
    """Though the network is that of the checkpoint, whose evaluation had another one."""
    checkpoint.save(tmp_path / "best.pt", state)
    batches = []

    def detect_and_note(outputs, sizes, recipe):
        batches.append(len(sizes))
        return detect(outputs, sizes, recipe)

    monkeypatch.setattr("ssd_mmdet.detector.detect", detect_and_note)
    images = [str(path) for path in sorted((TINY / "val2017").iterdir())[:9]]
    where = [f"--checkpoint={tmp_path / 'best.pt'}", f"--show_dir={tmp_path}", "--device=cpu"]
    assert demo.main([*images, *where, "--batch_size=5", "--show", "--config=a.py"]) == 0
    assert batches == [5, 4]
    output = capsys.readouterr().out
    assert "9 of 9 images drawn" in output
    assert "--config has no effect: the checkpoint shows its network" in output
    assert f"--show has no effect: the pictures will be in {tmp_path}" in output


def test_detections_are_those_of_the_evaluation_input(detector):
    images = pictures(4)
    for image, found in zip(images, detector(images), strict=True):
        with torch.no_grad():
            outputs = detector.model(prepare_image(image, RECIPE).unsqueeze(0))
        (expected,) = detect(outputs, torch.tensor([image.shape[:2]]), RECIPE)
        assert len(expected.scores) > 10
        assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
        assert_close(detector(image).scores, expected.scores, rtol=0, atol=1e-4)
