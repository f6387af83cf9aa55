"""Class-wise greedy non-maximum suppression on the host: fp32, exact, no shifted coordinates."""

import functools
import sys

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
    boxes = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)
    scores = np.asarray(scores, dtype=np.float32)
    labels = np.asarray(labels)
    left = np.flatnonzero(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
    # Only better boxes decide about a box: the best few are enough if enough of them survive.
    few = len(left) if limit is None else 2 * limit
    while True:
        best = left
        if few < len(left):
            best = left[scores[left] >= np.partition(scores[left], -few)[-few]]
        kept = _suppress(boxes, scores, labels, best, iou_threshold)
        if len(best) == len(left) or len(kept) >= limit:
            return kept[:limit]
        few *= 2


def _suppress(boxes, scores, labels, chosen, iou_threshold: float) -> np.ndarray:
    """Greedy NMS among the `chosen` positions."""
    ranked = chosen[np.argsort(-scores[chosen], kind="stable")]
    labels = labels[ranked]
    grouped = np.argsort(labels, kind="stable")  # by class, within a class best first
    starts = np.unique(labels[grouped], return_index=True)[1]
    nms = _nms_torchvision if _torchvision() else _nms_numpy
    kept = nms(boxes[ranked[grouped]], np.append(starts, len(ranked)), float(iou_threshold))
    return ranked[np.sort(grouped[kept])]


@functools.cache
def _torchvision():
    """torchvision.ops.nms, or None where torchvision is absent or was built for another torch.

    On an NPU host it is not even tried: there is no torchvision for torch_npu's torch.
    """
    if "torch_npu" in sys.modules:
        return None
    try:
        from torchvision.ops import nms
    except (ImportError, RuntimeError):
        return None
    return nms


def _nms_torchvision(boxes: np.ndarray, bounds: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Mask (n,) of the survivors; class c is boxes[bounds[c]:bounds[c + 1]], best first."""
    nms, boxes = _torchvision(), torch.from_numpy(boxes)
    falling = -torch.arange(len(boxes), dtype=torch.float32)  # stands for the sorted scores
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        kept[first + nms(boxes[first:last], falling[: last - first], iou_threshold)] = True
    return kept.numpy()


def _nms_numpy(boxes: np.ndarray, bounds: np.ndarray, iou_threshold: float) -> np.ndarray:
    """The same mask as `_nms_torchvision`, all classes at once: one step a rank within a class."""
    sizes = np.diff(bounds)
    by_size = np.argsort(-sizes, kind="stable")  # so that the classes still at work come first
    starts, sizes = bounds[:-1][by_size], sizes[by_size]
    ranks = np.arange(sizes.max(initial=0))
    alive = ranks < sizes[:, None]  # (C, L), L boxes in the largest class
    rows = np.where(alive, starts[:, None] + ranks, 0)
    x1, y1, x2, y2 = boxes.T[:, rows] if len(boxes) else np.zeros((4, *rows.shape), np.float32)
    with np.errstate(all="ignore"):  # 0 / 0, of boxes without area, suppresses nothing
        areas = (x2 - x1) * (y2 - y1)
        for rank in ranks:
            best = np.flatnonzero(alive[:, rank])[:, None]
            if not best.size:
                continue
            rest = ranks[None, rank + 1 : sizes[best[0, 0]]]
            width = np.minimum(x2[best, rank], x2[best, rest])
            width -= np.maximum(x1[best, rank], x1[best, rest])
            height = np.minimum(y2[best, rank], y2[best, rest])
            height -= np.maximum(y1[best, rank], y1[best, rest])
            overlap = np.maximum(width, 0) * np.maximum(height, 0)
            iou = overlap / (areas[best, rank] + areas[best, rest] - overlap)
            # Compared in float64, as torchvision does: the fp32 nearest to 0.3 is above 0.3.
            alive[best, rest] &= ~(iou.astype(np.float64) > iou_threshold)
    kept = np.zeros(len(boxes), dtype=bool)
    kept[rows[alive]] = True
    return kept
