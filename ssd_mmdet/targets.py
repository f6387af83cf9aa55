"""Matching of padded ground truth to anchors, batched, with fixed shapes.

The rules are those of the SSD paper, section 2.2, with the details of MMDetection's MaxIoUAssigner
as the original configures it: one IoU threshold for positives and negatives, ties go to the first.
"""

import torch
from torch import Tensor

from common.npu.operators import constant, first_max, write_claims


def pairwise_iou(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Return the IoU (N, M, P) of boxes (N, M, 4) with anchors (P, 4)."""
    left, top, right, bottom = boxes_xyxy.unsqueeze(2).unbind(-1)  # (N, M, 1) each
    anchor_left, anchor_top, anchor_right, anchor_bottom = anchors_xyxy.unbind(-1)  # (P,) each
    overlap_width = torch.minimum(right, anchor_right) - torch.maximum(left, anchor_left)
    overlap_height = torch.minimum(bottom, anchor_bottom) - torch.maximum(top, anchor_top)
    overlap = overlap_width.clamp(min=0) * overlap_height.clamp(min=0)
    areas = (right - left) * (bottom - top)
    anchor_areas = (anchor_right - anchor_left) * (anchor_bottom - anchor_top)
    union = areas + anchor_areas - overlap
    return overlap / union


def assign(
    anchors_xyxy: Tensor, boxes_xyxy: Tensor, labels: Tensor, valid: Tensor, match_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which ground truth each anchor learns.

    The inputs are `anchors_xyxy` (P, 4), `boxes_xyxy` (N, M, 4) in the same pixels, `labels` (N, M)
    of 0-based classes and `valid` (N, M) bool. The results are `positive` (N, P) bool, `matched`
    (N, P) int64, the column of each anchor's ground truth, and `label` (N, P), its class; `matched`
    and `label` are meaningless where `positive` is false.

    An anchor takes the ground truth of the highest IoU (the first of equals) and is positive if
    that IoU is at least `match_iou`. Every ground truth also claims its best anchor (the first of
    equals), whatever the IoU. If several claim the same anchor, the last one gets it.
    """
    column = torch.arange(valid.shape[1], device=valid.device)

    # A box without area overlaps nothing, so padding never matches.
    zero = constant(0.0, boxes_xyxy.device)
    boxes_xyxy = torch.where(valid.unsqueeze(-1), boxes_xyxy, zero)
    iou = pairwise_iou(boxes_xyxy, anchors_xyxy)
    best_iou, best_box = first_max(iou, dim=1)  # (N, P)
    _, best_anchor = first_max(iou, dim=2)  # (N, M)

    is_later = column > column.unsqueeze(1)  # [i, j]: box j comes after box i
    same_anchor = best_anchor.unsqueeze(1) == best_anchor.unsqueeze(2)
    overridden = (same_anchor & is_later & valid.unsqueeze(1)).any(dim=2)
    claimed_by = write_claims(best_anchor, valid & ~overridden, len(anchors_xyxy))
    is_claimed = claimed_by >= 0
    matched = torch.where(is_claimed, claimed_by, best_box)
    positive = is_claimed | (best_iou >= match_iou)
    return positive, matched, labels.gather(1, matched)
