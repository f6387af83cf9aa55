"""Assignment of padded ground truth to points, batched, with fixed shapes (FCOS paper, 3.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fcos.anchors import Level


def assign(
    levels: Sequence[Level],
    boxes_xyxy: Tensor,
    labels: Tensor,
    valid: Tensor,
    center_radius: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which ground truth each point learns.

    `boxes_xyxy` (N, M, 4) pixels, `labels` (N, M) 0-based classes, `valid` (N, M) bool. Returns
    `positive` (N, P) bool, `matched` (N, P) int64, the index of each point's ground truth, and
    `label` (N, P); the last two mean something where positive.

    A point learns the smallest box that it lies strictly inside and whose largest distance is in
    the range of its level, both ends included; of equal areas the first. With a `center_radius`
    it must also lie strictly inside the square of that many strides around the box's centre.
    """
    # An empty box has no inside, so padding never matches.
    boxes_xyxy = torch.where(valid.unsqueeze(-1), boxes_xyxy, 0.0)
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    by_area = size.prod(dim=-1).argsort(dim=1, stable=True)  # (N, M)
    ordered = boxes_xyxy.gather(1, by_area.unsqueeze(-1).expand_as(boxes_xyxy))
    left, top, right, bottom = ordered.unsqueeze(-1).unbind(2)  # (N, M, 1) each
    slots = valid.shape[1]
    priority = torch.arange(slots, 0, -1, device=valid.device, dtype=torch.int32).view(1, -1, 1, 1)

    best = []
    for level in levels:
        reach = center_radius * level.stride
        # All conditions are of columns or of rows, but for one: the larger of both may be what
        # reaches the lower bound of the range.
        inside_x, fits_x, far_x = _along(level.x, left, right, reach, level)
        inside_y, fits_y, far_y = _along(level.y, top, bottom, reach, level)
        candidate = (inside_x & fits_x).unsqueeze(2) & (inside_y & fits_y).unsqueeze(3)
        candidate &= far_x.unsqueeze(2) | far_y.unsqueeze(3)  # (N, M, rows, columns)
        best.append(torch.where(candidate, priority, 0).amax(dim=1).flatten(1))
    best = torch.cat(best, dim=1)  # (N, P) priority of the smallest box, 0 without any

    positive = best > 0
    matched = by_area.gather(1, torch.where(positive, slots - best, 0).long())
    return positive, matched, labels.gather(1, matched)


def _along(
    place: Tensor, low: Tensor, high: Tensor, reach: float, level: Level
) -> tuple[Tensor, Tensor, Tensor]:
    """Of points at `place` (K,) and box sides `low`, `high` (N, M, 1) along one axis: is the point
    inside, within the upper bound of the level's range, at or above the lower one; (N, M, K)."""
    before, after = place - low, high - place
    largest = torch.maximum(before, after)
    if reach:
        center = (low + high) / 2
        before = place - torch.maximum(center - reach, low)
        after = torch.minimum(center + reach, high) - place
    inside = torch.minimum(before, after) > 0
    return inside, largest <= level.high, largest >= level.low
