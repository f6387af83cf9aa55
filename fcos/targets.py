"""Assignment of padded ground truth to points, batched, with fixed shapes.

Source: FCOS paper, section 3.1, with the details of MMDetection's FCOSHead.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fcos.anchors import Level


class AxisTest(NamedTuple):
    """What the position along one axis says about K points and M boxes, each (N, M, K) bool."""

    # The point is inside the box, and no further than the level's largest distance from its sides.
    fits: Tensor
    # One of the two sides is at least the level's smallest distance away.
    reaches: Tensor


def assign(
    levels: Sequence[Level],
    gt_boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    center_radius: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which ground truth each point learns.

    The inputs are `gt_boxes` (N, M, 4) xyxy in pixels of the network input, `labels` (N, M) of
    0-based classes and `valid` (N, M) bool. The results are `positive` (N, P) bool, `matched`
    (N, P) int64, the column of each point's ground truth, and `label` (N, P), its class; `matched`
    and `label` are meaningless where `positive` is false.

    A point learns the smallest box (the first of equals) that it lies strictly inside and whose
    largest distance is in the range of its level, both ends included. With a `center_radius` above
    0 it must also lie strictly inside the square of that many strides around the box centre.
    """
    # An empty box has no inside, so padding never matches.
    gt_boxes = torch.where(valid.unsqueeze(-1), gt_boxes, 0.0)
    box_sizes = gt_boxes[..., 2:] - gt_boxes[..., :2]
    areas = box_sizes.prod(dim=-1)
    smallest_first = areas.argsort(dim=1, stable=True)  # (N, M)
    sorted_boxes = gt_boxes.gather(1, smallest_first.unsqueeze(-1).expand_as(gt_boxes))
    left, top, right, bottom = sorted_boxes.unsqueeze(-1).unbind(2)  # (N, M, 1) each

    # The smallest box has the highest priority. A point without a box gets priority 0.
    max_boxes = valid.shape[1]
    priority = torch.arange(max_boxes, 0, -1, device=valid.device, dtype=torch.int32)
    priority = priority.view(1, -1, 1, 1)

    best_priorities = []
    for level in levels:
        reach = center_radius * level.stride
        # Nearly all conditions concern only the column or only the row of a point. So they are
        # tested along the axes, which is far less work than for every point of the grid.
        column = _test_axis(level.x, left, right, reach, level)
        row = _test_axis(level.y, top, bottom, reach, level)
        fits = column.fits.unsqueeze(2) & row.fits.unsqueeze(3)  # (N, M, rows, columns)
        reaches = column.reaches.unsqueeze(2) | row.reaches.unsqueeze(3)
        best_priority = torch.where(fits & reaches, priority, 0).amax(dim=1)
        best_priorities.append(best_priority.flatten(1))
    best_priority = torch.cat(best_priorities, dim=1)  # (N, P)

    positive = best_priority > 0
    sorted_column = torch.where(positive, max_boxes - best_priority, 0).long()
    matched = smallest_first.gather(1, sorted_column)
    label = labels.gather(1, matched)
    return positive, matched, label


def _test_axis(
    coordinates: Tensor, start: Tensor, end: Tensor, reach: float, level: Level
) -> AxisTest:
    """Test point coordinates (K,) against box sides `start` and `end` (N, M, 1) along one axis.

    `reach` is half the side of the square around the box centre in pixels, 0 for no such square.
    """
    to_start = coordinates - start
    to_end = end - coordinates
    largest_distance = torch.maximum(to_start, to_end)
    if reach:
        center = (start + end) / 2
        to_start = coordinates - torch.maximum(center - reach, start)
        to_end = torch.minimum(center + reach, end) - coordinates
    is_inside = torch.minimum(to_start, to_end) > 0
    return AxisTest(
        fits=is_inside & (largest_distance <= level.max_distance),
        reaches=largest_distance >= level.min_distance,
    )
