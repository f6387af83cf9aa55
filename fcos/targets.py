"""Assignment of padded ground truth to points, batched, with fixed shapes.

Source: FCOS paper, section 3.1, with the details of MMDetection's FCOSHead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.npu.operators import constant
from fcos.anchors import Axis


class AxisTest(NamedTuple):
    """What the position along one axis says about K columns or rows and M boxes.

    Both are (N, M, K) bool.
    """

    # The point is inside the box, and no further than the level's largest distance from its sides.
    fits: Tensor
    # One of the two sides is at least the level's smallest distance away.
    reaches: Tensor


def assign(
    axes: tuple[Axis, Axis],
    gt_boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    center_radius: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which ground truth each point learns.

    The inputs are the `axes` of the points, `gt_boxes` (N, M, 4) xyxy in pixels of the network
    input, `labels` (N, M) of 0-based classes and `valid` (N, M) bool. The results are `positive`
    (N, P) bool, `matched` (N, P) int64, the column of each point's ground truth, and `label`
    (N, P), its class; `matched` and `label` are meaningless where `positive` is false.

    A point learns the smallest box (the first of equals) that it lies strictly inside and whose
    largest distance is in the range of its level, both ends included. With a `center_radius` above
    0 it must also lie strictly inside the square of that many strides around the box centre.
    """
    # An empty box has no inside, so padding never matches.
    gt_boxes = torch.where(valid.unsqueeze(-1), gt_boxes, constant(0.0, gt_boxes.device))
    left, top, right, bottom = gt_boxes.unsqueeze(-1).unbind(2)  # (N, M, 1) each

    # Nearly all conditions concern only the column or only the row of a point. So they are tested
    # along the axes, of all levels at once, which is far less work than for every point.
    columns, rows = axes
    column_test = _test_axis(columns, left, right, center_radius)
    row_test = _test_axis(rows, top, bottom, center_radius)
    column_fits = column_test.fits.unsqueeze(2).split(columns.counts, dim=3)
    column_reaches = column_test.reaches.unsqueeze(2).split(columns.counts, dim=3)
    row_fits = row_test.fits.unsqueeze(3).split(rows.counts, dim=2)
    row_reaches = row_test.reaches.unsqueeze(3).split(rows.counts, dim=2)

    # A box's number is its priority, from 1 on, times the number of boxes plus its column: the
    # largest number is that of the smallest box and says which it is. A point without a box gets 0.
    max_boxes = valid.shape[1]
    column_of_box = torch.arange(max_boxes, device=valid.device, dtype=torch.int32)
    number = smallness_rank(gt_boxes) * max_boxes + column_of_box  # (N, M)
    number = number.unsqueeze(-1).unsqueeze(-1)
    no_number = torch.zeros((), device=valid.device, dtype=torch.int32)

    best_numbers = []
    for level in range(len(columns.counts)):
        fits = column_fits[level] & row_fits[level]  # (N, M, rows, columns)
        reaches = column_reaches[level] | row_reaches[level]
        best_number = torch.where(fits & reaches, number, no_number).amax(dim=1)
        best_numbers.append(best_number.flatten(1))
    best_number = torch.cat(best_numbers, dim=1)  # (N, P)

    positive = best_number > 0
    matched = (best_number % max_boxes).long()
    label = labels.gather(1, matched)
    return positive, matched, label


def has_point(axes: tuple[Axis, Axis], boxes_xyxy: Tensor, center_radius: float) -> Tensor:
    """Return which boxes (N, M, 4) have a point that would learn them, (N, M) bool.

    It is the rule of `assign` for each box as if it were the only one of its image.
    """
    columns, rows = axes
    left, top, right, bottom = boxes_xyxy.unsqueeze(-1).unbind(2)  # (N, M, 1) each
    column_test = _test_axis(columns, left, right, center_radius)
    row_test = _test_axis(rows, top, bottom, center_radius)
    column_fits = column_test.fits.split(columns.counts, dim=2)
    column_reaches = (column_test.fits & column_test.reaches).split(columns.counts, dim=2)
    row_fits = row_test.fits.split(rows.counts, dim=2)
    row_reaches = (row_test.fits & row_test.reaches).split(rows.counts, dim=2)

    # A point is a column and a row of the same level, which both fit and of which one reaches.
    found = torch.zeros(boxes_xyxy.shape[:2], dtype=torch.bool, device=boxes_xyxy.device)
    for level in range(len(columns.counts)):
        by_column = column_reaches[level].any(dim=2) & row_fits[level].any(dim=2)
        by_row = column_fits[level].any(dim=2) & row_reaches[level].any(dim=2)
        found |= by_column | by_row
    return found


def smallness_rank(boxes_xyxy: Tensor) -> Tensor:
    """Return the rank of each box (N, M, 4) by falling area, (N, M) int32, 1 for the largest.

    Of equal areas the first has the highest rank. Every two areas are compared: an Ascend 910A
    sorts in half precision, in which large areas are equal.
    """
    box_sizes = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    areas = box_sizes.prod(dim=-1)
    column = torch.arange(areas.shape[1], device=areas.device)
    is_later = column > column.unsqueeze(1)  # [i, j]: box j comes after box i
    this = areas.unsqueeze(2)
    other = areas.unsqueeze(1)
    comes_before = (this < other) | ((this == other) & is_later)  # (N, M, M): box i before box j
    return comes_before.sum(dim=2, dtype=torch.int32) + 1


def _test_axis(axis: Axis, start: Tensor, end: Tensor, center_radius: float) -> AxisTest:
    """Test the points of an axis against box sides `start` and `end` (N, M, 1) along it.

    `center_radius` is half the side of the square around the box centre in strides, 0 for no such
    square.
    """
    to_start = axis.coordinates - start
    to_end = end - axis.coordinates
    largest_distance = torch.maximum(to_start, to_end)
    if center_radius:
        center = (start + end) / 2
        reach = center_radius * axis.stride
        to_start = axis.coordinates - torch.maximum(center - reach, start)
        to_end = torch.minimum(center + reach, end) - axis.coordinates
    is_inside = torch.minimum(to_start, to_end) > 0
    return AxisTest(
        fits=is_inside & (largest_distance <= axis.max_distance),
        reaches=largest_distance >= axis.min_distance,
    )
