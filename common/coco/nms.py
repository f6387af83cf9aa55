"""Class-wise greedy non-maximum suppression on the host: fp32, exact, no shifted coordinates."""

import functools
import sys
from itertools import pairwise

import numpy as np
import torch


def class_nms(
    boxes_xyxy: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    iou_threshold: float,
    limit: int | None = None,
) -> np.ndarray:
    """Positions (int64) of the boxes that survive, best first; equal scores keep their order.

    boxes_xyxy (n, 4), scores (n,), labels (n,) integer. A box goes when its IoU with a kept better
    box of its class is greater than `iou_threshold`, or when it or its score is not finite. At most
    the `limit` best survivors are returned.
    """
    boxes = np.asarray(boxes_xyxy, np.float32).reshape(-1, 4)
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    ranked = np.flatnonzero(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
    ranked = ranked[np.argsort(-scores[ranked], kind="stable")]
    # Only better boxes decide about a box: the best few are enough if enough of them survive.
    few = len(ranked) if limit is None else 2 * limit
    while True:
        kept = _suppress(boxes, labels, ranked[:few], iou_threshold)
        if few >= len(ranked) or len(kept) >= limit:
            return kept[:limit]
        few *= 2


def _suppress(boxes, labels, ranked: np.ndarray, iou_threshold: float) -> np.ndarray:
    """The survivors among the positions `ranked`, which stand best first."""
    nms = _torchvision() or _greedy
    order = np.argsort(labels[ranked], kind="stable")
    by_class = ranked[order]
    boxes, changes = boxes[by_class], np.flatnonzero(np.diff(labels[by_class])) + 1
    survives = np.zeros(len(ranked), bool)
    for first, last in pairwise([0, *changes, len(ranked)]):
        survives[order[first:last][nms(boxes[first:last], iou_threshold)]] = True
    return ranked[survives]


@functools.cache
def _torchvision():
    """`_greedy` by torchvision; None where it is absent, of another torch, or torch_npu is used."""
    if "torch_npu" in sys.modules:
        return None
    try:
        from torchvision.ops import nms
    except (ImportError, RuntimeError):
        return None

    def torchvision_nms(boxes: np.ndarray, iou_threshold: float) -> np.ndarray:
        falling = torch.arange(0.0, -len(boxes), -1.0)  # stands for the sorted scores
        return nms(torch.from_numpy(boxes), falling, iou_threshold).numpy()

    return torchvision_nms


@np.errstate(all="ignore")  # 0 / 0, of boxes without area, suppresses nothing
def _greedy(boxes: np.ndarray, iou_threshold: float) -> list[int]:
    """Positions of the survivors among `boxes` (n, 4) of one class, which stand best first."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept, left = [], np.arange(len(boxes))
    while left.size > 1:
        best, left = left[0], left[1:]
        kept.append(best)
        rest = boxes[left]
        sides = np.minimum(boxes[best, 2:], rest[:, 2:]) - np.maximum(boxes[best, :2], rest[:, :2])
        overlap = np.maximum(sides, 0).prod(axis=1)
        iou = overlap / (areas[best] + areas[left] - overlap)
        # Compared in float64, as torchvision does: the fp32 nearest to 0.3 is above 0.3.
        left = left[~(iou.astype(np.float64) > iou_threshold)]
    return [*kept, *left]
