"""Class-wise greedy non-maximum suppression on the host: fp32, exact, no shifted coordinates."""

import functools
import itertools
from collections.abc import Callable

import numpy as np
import torch

from common.npu.device import has_torchvision_operators

# Takes the boxes (n, 4) of one class, best first, and the IoU threshold; returns the positions of
# the survivors.
NmsOfOneClass = Callable[[np.ndarray, float], np.ndarray]


def class_nms(
    boxes_xyxy, scores, labels, iou_threshold: float, limit: int | None = None
) -> np.ndarray:
    """Return the positions (int64) of the boxes that survive, best first.

    boxes_xyxy (n, 4), scores (n,), labels (n,) integer. A box goes when its IoU with a kept better
    box of its class is greater than `iou_threshold`, or when it or its score is not finite. Equal
    scores keep their order. At most the `limit` best survivors are returned.
    """
    boxes = np.asarray(boxes_xyxy, np.float32).reshape(-1, 4)
    scores = np.asarray(scores, np.float32)
    labels = np.asarray(labels)
    is_finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    ranked = np.flatnonzero(is_finite)
    by_falling_score = np.argsort(-scores[ranked], kind="stable")
    ranked = ranked[by_falling_score]
    if limit is None:
        limit = len(ranked)
    # Only better boxes decide about a box: the best ones are enough if enough of them survive.
    num_considered = 2 * limit
    while True:
        best = ranked[:num_considered]
        survives = _survives(boxes[best], labels[best], iou_threshold)
        if num_considered >= len(ranked) or survives.sum() >= limit:
            return best[survives][:limit]
        num_considered *= 2


def _survives(boxes: np.ndarray, labels: np.ndarray, iou_threshold: float) -> np.ndarray:
    """True for the boxes (n, 4), best first, that survive among those of their class."""
    nms_of_one_class = fastest_nms()
    by_class = np.argsort(labels, kind="stable")
    boxes = boxes[by_class]
    class_starts = np.flatnonzero(np.diff(labels[by_class])) + 1
    borders = [0, *class_starts.tolist(), len(boxes)]
    survives = np.zeros(len(boxes), bool)
    for start, end in itertools.pairwise(borders):
        kept = nms_of_one_class(boxes[start:end], iou_threshold)
        survives[by_class[start + kept]] = True
    return survives


@functools.cache
def fastest_nms() -> NmsOfOneClass:
    """Return torchvision's suppression, or our own where that cannot be used."""
    if has_torchvision_operators():
        return torchvision_nms
    return greedy_nms


def torchvision_nms(boxes: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Return what `greedy_nms` does, by torchvision's operator."""
    falling_scores = torch.arange(0.0, -len(boxes), -1.0)
    boxes = torch.from_numpy(boxes)
    return torch.ops.torchvision.nms(boxes, falling_scores, iou_threshold).numpy()


@np.errstate(all="ignore")  # 0 / 0, of boxes without area, suppresses nothing
def greedy_nms(boxes: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Return the positions of the survivors among boxes (n, 4) of one class, best first."""
    top_left = boxes[:, :2]
    bottom_right = boxes[:, 2:]
    areas = (bottom_right - top_left).prod(axis=1)
    candidates = np.arange(len(boxes))
    kept = []
    while len(candidates):
        best = candidates[0]
        others = candidates[1:]
        kept.append(best)
        shared_end = np.minimum(bottom_right[best], bottom_right[others])
        shared_start = np.maximum(top_left[best], top_left[others])
        overlap = np.maximum(shared_end - shared_start, 0).prod(axis=1)
        iou = overlap / (areas[best] + areas[others] - overlap)
        # Compared in float64, as torchvision does: the fp32 nearest to 0.3 is above 0.3.
        is_suppressed = iou.astype(np.float64) > iou_threshold
        candidates = others[~is_suppressed]
    return np.array(kept, np.int64)
