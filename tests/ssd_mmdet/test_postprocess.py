from dataclasses import replace

import numpy as np
import pytest
import torch

from common.coco.nms import class_nms
from ssd_mmdet import postprocess
from ssd_mmdet.anchors import encode, make_anchors
from ssd_mmdet.config import RECIPES
from ssd_mmdet.postprocess import decode_outputs, detect

RECIPE = RECIPES["1p"]
SIZES = torch.tensor([[480, 640], [300, 200], [1, 1]])


def outputs(seed, images=1, classes=6, background=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, 8732, classes + 1, generator=generator)
    logits[..., -1] += background
    return torch.randn(images, 8732, 4, generator=generator), logits


def nothing(images=1):
    offsets, logits = torch.zeros(images, 8732, 4), torch.zeros(images, 8732, 7)
    logits[..., -1] = 20
    return offsets, logits


@pytest.fixture(params=["cpu", "accelerator"], autouse=True)
def _kind_of_device(request, monkeypatch):
    """An accelerator's choice of candidates is tested on a CPU, which can do it, too."""
    is_cpu = request.param == "cpu"
    monkeypatch.setattr(postprocess, "in_host_memory", lambda device: is_cpu)


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_one_box_in_pixels_of_the_original():
    offsets, logits = nothing()
    anchor = 5776 + (7 * 19 + 4) * 6  # second map, row 7, column 4, first shape
    logits[0, anchor, 2] = 30
    (found,) = detect((offsets, logits), SIZES[:1], RECIPE)
    x, y, half = 4.5 * 16 / 300, 7.5 * 16 / 300, 22.5 / 300
    box = [(x - half) * 640, (y - half) * 480, (x + half) * 640, (y + half) * 480]
    torch.testing.assert_close(found.boxes, torch.tensor([box]))
    assert found.labels.tolist() == [2]
    assert found.scores.item() == pytest.approx(1, abs=1e-4)


def test_no_detection_is_an_answer():
    for found in detect(nothing(2), SIZES[:2], RECIPE):
        assert [tuple(x.shape) for x in found] == [(0, 4), (0,), (0,)]
        assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.int64]


def test_an_image_that_is_not_finite_gives_none_and_harms_no_other():
    offsets, logits = outputs(0, images=2)
    alone = detect((offsets[1:], logits[1:]), SIZES[1:2], RECIPE)[0]
    logits[0] = float("nan")
    broken, other = detect((offsets, logits), SIZES[:2], RECIPE)
    assert len(broken.scores) == 0
    assert_same(other, alone)


def test_detections_keep_the_rules():
    recipe = replace(RECIPE, max_detections=60, score_threshold=0.3)
    for found, (height, width) in zip(
        detect(outputs(1, images=3), SIZES, recipe), SIZES.tolist(), strict=True
    ):
        assert len(found.scores) == 60
        assert (found.scores[:-1] >= found.scores[1:]).all()
        assert found.scores.min() > 0.3
        assert set(found.labels.tolist()) <= set(range(6))
        assert found.boxes.min() >= 0
        assert (found.boxes <= torch.tensor([width, height, width, height]) * (1 + 1e-6)).all()
        again = class_nms(found.boxes, found.scores, found.labels, recipe.nms_iou)
        assert again.tolist() == list(range(60))  # nothing left to suppress


def test_the_score_must_be_above_the_threshold():
    raw = outputs(2)
    _, scores = decode_outputs(raw, make_anchors(RECIPE), RECIPE)
    limit = scores[0, 100].max().item()
    free = replace(RECIPE, nms_iou=1.0, max_detections=10**6)
    at, below = (
        detect(raw, SIZES[:1], replace(free, score_threshold=threshold))[0].scores
        for threshold in (limit, np.nextafter(np.float32(limit), np.float32(0)).item())
    )
    assert limit not in at.tolist()
    assert len(below) == len(at) + 1 == (scores >= limit).sum()


def test_a_copy_in_another_class_is_no_duplicate():
    anchors = make_anchors(RECIPE)
    offsets, logits = nothing()
    for anchor, label, logit in ((8000, 1, 30.0), (8001, 1, 29.0)):
        logits[0, anchor, label] = logit
    offsets[0, 8001] = encode(anchors[8000], anchors[8001], RECIPE)
    (found,) = detect((offsets, logits), SIZES[:1], RECIPE)
    assert found.labels.tolist() == [1]
    logits[0, 8001, 4] = 29.0  # now the second anchor is half of each class
    (found,) = detect((offsets, logits), SIZES[:1], RECIPE)
    assert found.labels.tolist() == [1, 4]
    torch.testing.assert_close(found.boxes[0], found.boxes[1], rtol=0, atol=1e-3)


def test_a_batch_is_its_images():
    raw = outputs(3, images=3)
    together = detect(raw, SIZES, RECIPE)
    for n, found in enumerate(together):
        assert_same(found, detect([x[n : n + 1] for x in raw], SIZES[n : n + 1], RECIPE)[0])


def test_half_precision_outputs_are_decoded_in_fp32():
    halves = [x.bfloat16() for x in outputs(4)]
    found = detect(halves, SIZES[:1], RECIPE)[0]
    assert_same(found, detect([x.float() for x in halves], SIZES[:1], RECIPE)[0])
    assert found.boxes.dtype == found.scores.dtype == torch.float32


def in_order(found):
    """The detections with equal scores in order of class and position, which no rule decides."""
    order = np.lexsort((found.boxes[:, 0], found.labels, -found.scores))
    return [part[order] for part in found]


@pytest.mark.parametrize("best", [10, 300, 4096])
@pytest.mark.parametrize("background", [0.0, 4.0, 8.0])
def test_the_best_candidates_are_enough_or_all_are_taken(monkeypatch, best, background):
    """Where they do not fill the list, an accelerator's detections are those of all candidates."""
    raw = outputs(5, images=2, background=background)
    monkeypatch.setattr(postprocess, "in_host_memory", lambda device: True)
    of_all = detect(raw, SIZES[:2], RECIPE)
    monkeypatch.setattr(postprocess, "in_host_memory", lambda device: False)
    monkeypatch.setattr(postprocess, "MAX_DEVICE_CANDIDATES", best)
    of_best = detect(raw, SIZES[:2], RECIPE)
    for own, expected in zip(of_best, of_all, strict=True):
        assert len(own.scores) > 100
        assert_same(in_order(own), in_order(expected))
