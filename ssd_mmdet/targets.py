"""Matching of padded ground truth to anchors, batched, with fixed shapes (SSD paper section 2.2).

The rules are MMDetection's MaxIoUAssigner's: both thresholds equal, ties to the first anchor.
"""

import torch
from torch import Tensor


def pairwise_iou(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """IoU (N, M, P) of boxes (N, M, 4) with anchors (P, 4)."""
    left, top, right, bottom = (side.unsqueeze(-1) for side in boxes_xyxy.unbind(-1))
    anchor_left, anchor_top, anchor_right, anchor_bottom = anchors_xyxy.unbind(-1)
    width = torch.minimum(right, anchor_right).sub_(torch.maximum(left, anchor_left))
    height = torch.minimum(bottom, anchor_bottom).sub_(torch.maximum(top, anchor_top))
    overlap = width.clamp_(min=0).mul_(height.clamp_(min=0))
    areas = (right - left) * (bottom - top)
    anchor_areas = (anchor_right - anchor_left) * (anchor_bottom - anchor_top)
    return overlap.div_((areas + anchor_areas).sub_(overlap))


def assign(
    anchors_xyxy: Tensor, boxes_xyxy: Tensor, labels: Tensor, valid: Tensor, match_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which ground truth each anchor learns.

    `anchors_xyxy` (P, 4), `boxes_xyxy` (N, M, 4) in the same pixels, `labels` (N, M) 0-based
    classes, `valid` (N, M) bool. Returns `positive` (N, P) bool, `matched` (N, P) int64, the index
    of each anchor's ground truth, and `label` (N, P); the last two mean something where positive.

    An anchor takes the ground truth of highest IoU (the first of equals) and is positive from
    `match_iou` on. Every ground truth also claims its best anchor (the first of equals), whatever
    the IoU; where two claim the same one, the later has it.
    """
    images, slots = valid.shape
    # An empty box overlaps nothing, so padding never matches.
    iou = pairwise_iou(torch.where(valid.unsqueeze(-1), boxes_xyxy, 0.0), anchors_xyxy)
    best_iou, matched = iou.max(dim=1)

    claimed = iou.argmax(dim=2)  # (N, M) anchor of each ground truth
    slot = torch.arange(slots, device=valid.device)
    later = slot > slot.unsqueeze(1)  # [i, j]: j comes after i
    same = claimed.unsqueeze(1) == claimed.unsqueeze(2)
    outdone = (same & later & valid.unsqueeze(1)).any(dim=2)
    # Claims that do not count go to one column too many: no two real ones share a place, so the
    # result does not depend on the order of the scatter.
    anchors = anchors_xyxy.shape[0]
    place = torch.where(valid & ~outdone, claimed, anchors)
    claim = torch.full((images, anchors + 1), -1, dtype=torch.int64, device=valid.device)
    claim = claim.scatter(1, place, slot.expand(images, slots))[:, :anchors]

    forced = claim >= 0
    matched = torch.where(forced, claim, matched)
    positive = forced | (best_iou >= match_iou)
    return positive, matched, labels.gather(1, matched)
