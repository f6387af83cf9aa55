import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.coco import nms
from common.coco.nms import class_nms


def with_numpy(monkeypatch, *args):
    with monkeypatch.context() as patch:
        patch.setattr(nms, "torchvision_nms", lambda: None)
        return class_nms(*args)


def by_definition(boxes, scores, labels, threshold):
    """The definition, pair by pair, in fp32."""
    kept = []
    finite = [i for i in range(len(boxes)) if np.isfinite([*boxes[i], scores[i]]).all()]
    for i in sorted(finite, key=lambda i: (-scores[i], i)):
        if all(labels[i] != labels[j] or not iou(boxes[i], boxes[j]) > threshold for j in kept):
            kept.append(i)
    return kept


def iou(a, b):
    with np.errstate(all="ignore"):
        width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        overlap = max(width, np.float32(0)) * max(height, np.float32(0))
        areas = np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])
        return float(overlap / (areas[0] + areas[1] - overlap))


def scene(seed, n, classes, grid):
    """Random boxes; `grid` makes equal scores, equal boxes, exact IoUs and empty boxes common."""
    rng = np.random.default_rng(seed)
    corners, sizes = rng.uniform(0, 8, (n, 2)), rng.uniform(0, 6, (n, 2))
    scores = rng.random(n)
    if grid:
        corners, sizes, scores = corners.round(), sizes.round(), scores.round(1)
    boxes = np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)
    return boxes, scores.astype(np.float32), rng.integers(0, classes, n)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 60),
    classes=st.integers(1, 5),
    grid=st.booleans(),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 1 / 3, 1.0]),
    holes=st.booleans(),
)
def test_both_paths_follow_the_definition(seed, n, classes, grid, threshold, holes):
    boxes, scores, labels = scene(seed, n, classes, grid)
    if holes and n:
        boxes[::7, seed % 4] = np.nan
        scores[::5] = np.nan
    expected = by_definition(boxes, scores, labels, threshold)
    np.testing.assert_array_equal(class_nms(boxes, scores, labels, threshold), expected)
    with pytest.MonkeyPatch.context() as patch:
        numpy_result = with_numpy(patch, boxes, scores, labels, threshold)
    np.testing.assert_array_equal(numpy_result, expected)


def test_torchvision_is_the_path_taken_here():
    pytest.importorskip("torchvision")
    assert nms.fastest_nms() is nms.torchvision_nms


def test_paths_agree_on_many_boxes(monkeypatch):
    boxes, scores, labels = scene(0, 3000, 20, grid=False)
    labels[:1500] = 3  # one class far larger than the others
    result = class_nms(boxes, scores, labels, 0.45)
    assert 20 < len(result) < 3000
    np.testing.assert_array_equal(result, with_numpy(monkeypatch, boxes, scores, labels, 0.45))
    assert (np.diff(scores[result]) <= 0).all()


@pytest.mark.parametrize("torchvision", [True, False])
def test_iou_equal_to_the_threshold_survives(monkeypatch, torchvision):
    boxes = np.array([[0, 0, 2, 1], [0, 0, 1, 1]])  # IoU 0.5
    args = boxes, np.array([0.9, 0.8]), np.array([4, 4])
    run = class_nms if torchvision else lambda *a: with_numpy(monkeypatch, *a)
    assert run(*args, 0.5).tolist() == [0, 1]
    assert run(*args, 0.49).tolist() == [0]
    assert run(boxes, args[1], np.array([4, 5]), 0.49).tolist() == [0, 1]


def test_nothing_in_nothing_out(monkeypatch):
    empty = np.empty((0, 4)), np.empty(0), np.empty(0, dtype=int), 0.5
    assert class_nms(*empty).shape == with_numpy(monkeypatch, *empty).shape == (0,)
