from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.coco.nms import class_nms
from ssd_resnet34 import postprocess
from ssd_resnet34.anchors import encode, make_anchors
from ssd_resnet34.config import RECIPES
from ssd_resnet34.postprocess import decode_outputs, detect

RECIPE = RECIPES["1p"]
SIZES = torch.tensor([[480, 640], [300, 200], [1, 1]])


def outputs(seed, images=1, classes=6, background=3.0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(images, 1 + classes, 8732, generator=generator)
    logits[:, 0] += background
    return torch.randn(images, 4, 8732, generator=generator), logits


def nothing(images=1):
    deltas, logits = torch.zeros(images, 4, 8732), torch.zeros(images, 7, 8732)
    logits[:, 0] = 20
    return deltas, logits


@pytest.fixture(params=["cpu", "accelerator"])
def _kind_of_device(request, monkeypatch):
    """An accelerator's choice of candidates is tested on a CPU, which can do it, too."""
    is_cpu = request.param == "cpu"
    monkeypatch.setattr(postprocess, "in_host_memory", lambda device: is_cpu)


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def in_order(found):
    """The detections with equal scores in order of class and position: theirs is not defined."""
    order = np.lexsort((found.boxes[:, 0], found.labels, -found.scores))
    return [part[order] for part in found]


@pytest.mark.usefixtures("_kind_of_device")
def test_one_box_in_pixels_of_the_original():
    deltas, logits = nothing()
    anchor = 5776 + 7 * 19 + 4  # second map, row 7, column 4
    logits[0, 3, anchor] = 30
    (found,) = detect((deltas, logits), SIZES[:1], RECIPE)
    x, y, half = 4.5 * 16 / 300, 7.5 * 16 / 300, 22.5 / 300
    box = [(x - half) * 640, (y - half) * 480, (x + half) * 640, (y + half) * 480]
    torch.testing.assert_close(found.boxes, torch.tensor([box]))
    assert found.labels.tolist() == [2]  # channel 0 is background
    assert found.scores.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.usefixtures("_kind_of_device")
def test_no_detection_is_an_answer():
    for found in detect(nothing(2), SIZES[:2], RECIPE):
        assert [tuple(x.shape) for x in found] == [(0, 4), (0,), (0,)]
        assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.int64]


@pytest.mark.usefixtures("_kind_of_device")
def test_an_image_that_is_not_finite_gives_none_and_harms_no_other():
    deltas, logits = outputs(0, images=2)
    alone = detect((deltas[1:], logits[1:]), SIZES[1:2], RECIPE)[0]
    logits[0] = float("nan")
    broken, other = detect((deltas, logits), SIZES[:2], RECIPE)
    assert len(broken.scores) == 0
    assert_same(other, alone)


@pytest.mark.usefixtures("_kind_of_device")
def test_detections_keep_the_rules():
    recipe = replace(RECIPE, max_per_class=40, max_detections=60, score_threshold=0.3)
    for found, (height, width) in zip(
        detect(outputs(1, images=3), SIZES, recipe), SIZES.tolist(), strict=True
    ):
        assert len(found.scores) == 60
        assert (found.scores[:-1] >= found.scores[1:]).all()
        assert found.scores.min() > 0.3
        assert set(found.labels.tolist()) <= set(range(6))
        unit = found.boxes / torch.tensor([width, height, width, height])
        again = class_nms(unit, found.scores, found.labels, recipe.nms_iou)
        assert again.tolist() == list(range(60))  # nothing left to suppress


@pytest.mark.usefixtures("_kind_of_device")
def test_the_score_must_be_above_the_threshold():
    raw = outputs(2)
    _, scores = decode_outputs(raw, make_anchors(RECIPE), RECIPE)
    limit = scores[0, :, 100].max().item()
    free = replace(RECIPE, nms_iou=1.0, max_per_class=8732, max_detections=10**6)
    at, below = (
        detect(raw, SIZES[:1], replace(free, score_threshold=threshold))[0].scores
        for threshold in (limit, np.nextafter(np.float32(limit), np.float32(0)).item())
    )
    assert limit not in at.tolist()
    assert len(below) == len(at) + 1 == (scores >= limit).sum()


@pytest.mark.usefixtures("_kind_of_device")
def test_only_the_best_of_a_class_enter_nms():
    # The second best of a class is a copy of the best, the third is far away: with two candidates
    # the copy is suppressed and the third never seen.
    deltas, logits = nothing()
    for anchor, logit in ((8000, 30.0), (8001, 29.0), (100, 28.0)):
        logits[0, 1, anchor] = logit
    anchors = make_anchors(RECIPE)
    deltas[0, :, 8001] = encode(anchors[8000], anchors[8001], RECIPE)
    counts = [
        len(detect((deltas, logits), SIZES[:1], replace(RECIPE, max_per_class=most))[0].scores)
        for most in (1, 2, 3)
    ]
    assert counts == [1, 1, 2]


def test_a_batch_is_its_images():
    raw = outputs(3, images=3)
    together = detect(raw, SIZES, RECIPE)
    for n, found in enumerate(together):
        alone = detect([x[n : n + 1] for x in raw], SIZES[n : n + 1], RECIPE)[0]
        assert_same(found, alone)


def test_half_precision_outputs_are_decoded_in_fp32():
    halves = [x.bfloat16() for x in outputs(4)]
    found = detect(halves, SIZES[:1], RECIPE)[0]
    assert_same(found, detect([x.float() for x in halves], SIZES[:1], RECIPE)[0])
    assert found.boxes.dtype == found.scores.dtype == torch.float32


@settings(max_examples=15, deadline=None, derandomize=True)  # scores may tie at a cut
@given(
    seed=st.integers(0, 10**6),
    background=st.sampled_from([0.0, 4.0, 8.0]),
    per_class=st.sampled_from([5, 200]),
)
def test_both_ways_find_the_same(seed, background, per_class):
    recipe = replace(RECIPE, max_per_class=per_class)
    raw = outputs(seed, images=2, background=background)
    expected = detect(raw, SIZES[:2], recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "in_host_memory", lambda device: False)
        found = detect(raw, SIZES[:2], recipe)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.scores, b.scores)
        assert_same(in_order(a), in_order(b))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 80),
    limit=st.integers(1, 40),
    ties=st.booleans(),
)
def test_a_limit_of_nms_only_cuts_its_end(seed, count, limit, ties):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.5, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (count, 2))], axis=1)
    scores = rng.random(count).round(1 if ties else 9)
    scores[: count // 10] = np.nan
    labels = rng.integers(0, 3, count)
    uncut = class_nms(boxes, scores, labels, 0.5)
    assert class_nms(boxes, scores, labels, 0.5, limit).tolist() == uncut[:limit].tolist()
