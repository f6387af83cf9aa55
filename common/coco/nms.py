"""Class-wise greedy non-maximum suppression on the host: fp32, exact, no shifted coordinates."""

import functools
import itertools
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
    order = np.argsort(labels[ranked], kind="stable")
    by_class = ranked[order]
    bounds = [0, *np.flatnonzero(np.diff(labels[by_class])) + 1, len(ranked)]
    nms = _torchvision() or _batched
    survives = np.zeros(len(ranked), bool)
    survives[order] = nms(boxes[by_class], np.array(bounds), iou_threshold)
    return ranked[survives]


@functools.cache
def _torchvision():
    """`_batched` by torchvision; None where that is absent or built for another torch."""
    if "torch_npu" in sys.modules:
        return None
    try:
        import torchvision  # noqa: F401 registers the operator
    except (ImportError, RuntimeError):
        return None

    def torchvision_nms(boxes: np.ndarray, bounds: np.ndarray, iou_threshold: float) -> np.ndarray:
        boxes, falling = torch.from_numpy(boxes), torch.arange(0.0, -len(boxes), -1.0)  # as scores
        survives = np.zeros(len(boxes), bool)
        for first, end in itertools.pairwise(bounds.tolist()):
            part = slice(first, end)
            kept = torch.ops.torchvision.nms(boxes[part], falling[part], iou_threshold)
            survives[first + kept.numpy()] = True
        return survives

    return torchvision_nms


@np.errstate(all="ignore")  # 0 / 0, of boxes without area, suppresses nothing
def _batched(boxes: np.ndarray, bounds: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Mask (n,) of the survivors; class c is boxes[bounds[c]:bounds[c + 1]], best first.

    All classes at once: one step a rank within a class.
    """
    by_size = np.argsort(-np.diff(bounds), kind="stable")  # the classes still at work come first
    starts, sizes = bounds[:-1][by_size], np.diff(bounds)[by_size]
    ranks = np.arange(sizes[0])
    alive = ranks < sizes[:, None]  # (C, L), L boxes in the largest class
    rows = np.where(alive, starts[:, None] + ranks, 0)
    corners = boxes[rows] if len(boxes) else np.zeros((*rows.shape, 4), np.float32)
    low, high = np.moveaxis(corners, -1, 0).reshape(2, 2, *rows.shape)  # (xy, C, L)
    areas = (high - low).prod(axis=0)
    for rank in ranks:
        best = np.flatnonzero(alive[:, rank])[:, None]
        if best.size:
            rest = ranks[None, rank + 1 : sizes[best[0, 0]]]
            sides = np.minimum(high[:, best, rank], high[:, best, rest])
            sides -= np.maximum(low[:, best, rank], low[:, best, rest])
            overlap = np.maximum(sides, 0).prod(axis=0)
            iou = overlap / (areas[best, rank] + areas[best, rest] - overlap)
            # Compared in float64, as torchvision does: the fp32 nearest to 0.3 is above 0.3.
            alive[best, rest] &= ~(iou.astype(np.float64) > iou_threshold)
    survives = np.zeros(len(boxes), bool)
    survives[rows[alive]] = True
    return survives
