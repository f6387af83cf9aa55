import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from m2det.anchors import make_anchors
from m2det.config import RECIPES
from m2det.postprocess import (
    FIRST_CANDIDATES,
    candidates,
    decode_outputs,
    detect,
    soft_nms,
    start_detect,
    submission_boxes,
)

RECIPE = RECIPES["320_vgg"]
ANCHORS = 12810
CLASSES = 3


def one_by_one(boxes, scores, iou_threshold, min_score, limit):
    """Soft-NMS of one group as the original does it: positions and scores, as they are taken."""
    left = [(float(score), position) for position, score in enumerate(scores)]
    taken = []
    while left and len(taken) < limit:
        best = max(left, key=lambda entry: (entry[0], -entry[1]))
        left.remove(best)
        taken.append(best)
        x1, y1, x2, y2 = boxes[best[1]]
        lowered = []
        for score, position in left:
            a1, b1, a2, b2 = boxes[position]
            w, h = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
            if w > 0 and h > 0:
                union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - w * h
                if w * h / union > iou_threshold:
                    score *= 1 - w * h / union
            if score >= min_score:
                lowered.append((score, position))
        left = lowered
    return [position for _, position in taken], [score for score, _ in taken]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    limit=st.integers(1, 12),
    spread=st.sampled_from([1.0, 10.0, 100.0]),
    ties=st.booleans(),
)
def test_soft_nms_is_the_originals_one_by_one(seed, sizes, limit, spread, ties):
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    low = rng.uniform(0, spread, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, 30, (count, 2))], axis=1).astype(np.float32)
    scores = rng.uniform(0.1, 1, count).astype(np.float32)
    if ties:
        scores = scores.round(1)
    group = np.repeat(np.arange(len(sizes)) * 7, sizes)
    kept, lowered = soft_nms(boxes, scores, group, 0.3, 0.001, limit)
    for number, size in zip(np.arange(len(sizes)) * 7, sizes, strict=True):
        first = np.flatnonzero(group == number)[0]
        rows = slice(first, first + size)
        positions, expected = one_by_one(boxes[rows].tolist(), scores[rows], 0.3, 0.001, limit)
        own = np.flatnonzero(group[kept] == number)
        own = own[np.lexsort((kept[own], -lowered[own]))]
        assert_allclose(lowered[own], expected, rtol=2e-5)
        assert_array_equal(kept[own], np.array(positions) + first)


@pytest.mark.parametrize("others", [0, 1, 300])
def test_soft_nms_of_equal_scores_is_that_of_the_group_alone(others):
    boxes = np.random.default_rng(0).uniform(0, 90, (400, 4)).astype(np.float32)
    boxes[:, 2:] = boxes[:, :2] + 30
    group = np.repeat([3, 5], [100, others])
    rows = boxes[: len(group)]
    kept, lowered = soft_nms(rows, np.ones_like(group, np.float32), group, 0.3, 0.001, 10)
    positions, expected = one_by_one(boxes[:100].tolist(), np.ones(100), 0.3, 0.001, 10)
    assert_array_equal(kept[kept < 100], positions)
    assert_allclose(lowered[kept < 100], expected, rtol=2e-5)


def test_soft_nms_drops_boxes_whose_score_falls_to_0():
    # 30 times the same box: 29 scores fall to 0.
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (40, 1))
    boxes[30:] += 100 * np.arange(1, 11, dtype=np.float32)[:, None]
    scores = np.linspace(0.9, 0.2, 40, dtype=np.float32)
    kept, lowered = soft_nms(boxes, scores, np.zeros(40, np.int64), 0.3, 0.001, 5)
    assert_array_equal(kept, [0, 30, 31, 32, 33])
    assert_array_equal(lowered, scores[kept])


def outputs(seed, images=1, objects=6):
    """Background everywhere but at a few anchors and what lies around them."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(images, ANCHORS, 4, generator=generator)
    logits = torch.randn(images, ANCHORS, 1 + CLASSES, generator=generator)
    logits[..., 0] += 12
    for n in range(images):
        for at in torch.randint(20, ANCHORS - 20, (objects,), generator=generator).tolist():
            channel = int(torch.randint(1, 1 + CLASSES, (1,), generator=generator))
            logits[n, at - 12 : at + 12, channel] += 13
    return deltas, logits


SIZES = torch.tensor([[480, 640], [200, 100], [33, 500]])


@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_a_batch_is_its_images(nms):
    recipe = replace(RECIPE, nms=nms)
    together = outputs(0, images=3)
    found = detect(together, SIZES, recipe)
    for n in range(3):
        (alone,) = detect([x[n : n + 1] for x in together], SIZES[n : n + 1], recipe)
        assert len(alone.scores) > 5
        for a, b in zip(found[n], alone, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_detections_are_best_first_inside_the_image_and_typed(nms):
    for n, found in enumerate(detect(outputs(1, images=3), SIZES, replace(RECIPE, nms=nms))):
        assert (found.scores.diff() <= 0).all()
        height, width = SIZES[n].tolist()
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert found.boxes.dtype == found.scores.dtype == torch.float32
        assert found.labels.dtype == torch.int64
        assert set(found.labels.tolist()) <= set(range(CLASSES))


@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_limits(nms):
    recipe = replace(RECIPE, nms=nms)
    (every,) = detect(outputs(2), SIZES[:1], recipe)
    (few,) = detect(outputs(2), SIZES[:1], replace(recipe, max_detections=4))
    assert len(every.scores) > 4
    for a, b in zip(few, every, strict=True):
        assert torch.equal(a, b[:4])
    (per_class,) = detect(outputs(2), SIZES[:1], replace(recipe, max_per_class=2))
    assert max(torch.bincount(per_class.labels)) == 2


def test_soft_and_hard_differ_by_what_overlaps():
    soft, hard = (
        detect(outputs(3), SIZES[:1], replace(RECIPE, nms=nms))[0] for nms in ("soft", "hard")
    )
    assert len(soft.scores) > len(hard.scores)
    assert soft.scores[0] == hard.scores[0]
    assert hard.scores.min() > RECIPE.score_threshold
    assert soft.scores.min() >= RECIPE.soft_nms_min_score


@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_nothing_found(nms):
    deltas, logits = outputs(4)
    logits[..., 0] += 100
    (found,) = detect((deltas, logits), SIZES[:1], replace(RECIPE, nms=nms))
    assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_values_that_are_not_finite_find_nothing_there(nms):
    deltas, logits = outputs(5)
    logits[0, :6000] = torch.nan
    deltas[0, 6000:9000] = torch.inf
    (found,) = detect((deltas, logits), SIZES[:1], replace(RECIPE, nms=nms))
    assert found.scores.isfinite().all()


@pytest.mark.parametrize("crowded", [False, True])
def test_candidates_miss_nothing(crowded):
    together = outputs(6, images=2)
    if crowded:
        together[1][1] = 3 * torch.randn(ANCHORS, 1 + CLASSES)
    found = []
    chosen = candidates(start_detect(together, RECIPE), RECIPE)
    for boxes, scores in (chosen, every_anchor(together)):
        passed = scores > RECIPE.score_threshold
        rows = passed.any(axis=2)
        found.append((boxes[rows], scores[rows], rows.sum(axis=1)))
    assert chosen[0].shape[1] == (ANCHORS if crowded else FIRST_CANDIDATES)
    for of_candidates, of_all in zip(*found, strict=True):
        assert_array_equal(of_candidates, of_all)
    assert (found[0][2] > 20).all()


def every_anchor(outputs):
    """What `candidates` returns, of all anchors."""
    boxes, scores = decode_outputs(outputs, make_anchors(RECIPE), RECIPE)
    return boxes.numpy(), scores[..., 1:].numpy()


def test_coco_rows_are_a_pixel_wider():
    boxes = np.array([[1.0, 2, 3, 4]], np.float32)
    assert_array_equal(submission_boxes(boxes, RECIPE), [[1, 2, 4, 5]])
    assert_array_equal(submission_boxes(boxes, replace(RECIPE, plus_one=False)), boxes)


@pytest.mark.parametrize("nms", ["soft", "hard"])
def test_boxes_too_large_for_a_number_overflow_without_a_warning(nms):
    recipe = replace(RECIPES["quickstart"], nms=nms)
    torch.manual_seed(0)
    num_anchors = len(make_anchors(recipe))
    outputs = torch.randn(1, num_anchors, 4) * 1000, torch.randn(1, num_anchors, 4) * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = detect(outputs, torch.tensor([[300, 400]]), recipe)
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([400.0, 300.0, 400.0, 300.0])).all()
