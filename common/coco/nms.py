"""Class-wise greedy non-maximum suppression on the host: fp32, exact, no shifted coordinates."""

import functools
import itertools
import sys

import numpy as np
import torch


def class_nms(boxes_xyxy, scores, labels, iou_threshold: float, limit=None) -> np.ndarray:
    """Positions (int64) of the boxes that survive, best first; equal scores keep their order.

    boxes_xyxy (n, 4), scores (n,), labels (n,) integer. A box goes when its IoU with a kept better
    box of its class is greater than `iou_threshold`, or when it or its score is not finite. At most
    the `limit` best survivors are returned.
    """
    nms, boxes = _torchvision() or _greedy, np.asarray(boxes_xyxy, np.float32).reshape(-1, 4)
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    ranked = np.flatnonzero(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
    ranked = ranked[np.argsort(-scores[ranked], kind="stable")]
    # Only better boxes decide about a box: the best few are enough if enough of them survive.
    few = len(ranked) if limit is None else 2 * limit
    while True:
        best = ranked[:few]
        survives = np.zeros(len(best), bool)
        order = np.argsort(labels[best], kind="stable")
        by_class, starts = boxes[best[order]], np.flatnonzero(np.diff(labels[best[order]])) + 1
        parts = itertools.pairwise([0, *starts.tolist(), len(best)])
        kept = [first + nms(by_class[first:end], iou_threshold) for first, end in parts]
        survives[order[np.concatenate(kept)]] = True
        if few >= len(ranked) or survives.sum() >= limit:
            return best[survives][:limit]
        few *= 2


@functools.cache
def _torchvision():
    """`_greedy` by torchvision; None where that is absent or built for another torch."""
    if "torch_npu" in sys.modules:
        return None
    try:
        import torchvision  # noqa: F401 registers the operator
    except (ImportError, RuntimeError):
        return None

    def torchvision_nms(boxes: np.ndarray, iou_threshold: float) -> np.ndarray:
        falling = torch.arange(0.0, -len(boxes), -1.0)  # as scores
        return torch.ops.torchvision.nms(torch.from_numpy(boxes), falling, iou_threshold).numpy()

    return torchvision_nms


@np.errstate(all="ignore")  # 0 / 0, of boxes without area, suppresses nothing
def _greedy(boxes: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Positions of the survivors among the boxes (n, 4) of one class, which stand best first."""
    low, high = boxes[:, :2], boxes[:, 2:]
    areas = (high - low).prod(axis=1)
    left, kept = np.arange(len(boxes)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        sides = np.minimum(high[best], high[left]) - np.maximum(low[best], low[left])
        overlap = np.maximum(sides, 0).prod(axis=1)
        iou = overlap / (areas[best] + areas[left] - overlap)
        # Compared in float64, as torchvision does: the fp32 nearest to 0.3 is above 0.3.
        left = left[~(iou.astype(np.float64) > iou_threshold)]
    return np.array(kept, np.int64)
