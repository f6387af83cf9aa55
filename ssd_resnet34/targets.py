"""Matching of ground truth to anchors, for a batch at once (SSD paper section 2.2).

The ground truth of N images is padded to M boxes each, so every shape is fixed: N and M are the
loader's, P is the number of anchors.
"""

import torch
from torch import Tensor

from common.npu.operators import constant, first_max, write_claims


def assign(
    anchors_xyxy: Tensor, boxes_xyxy: Tensor, labels: Tensor, valid: Tensor, match_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which ground truth each anchor learns.

    The inputs are `anchors_xyxy` (P, 4), `boxes_xyxy` (N, M, 4), both normalised, `labels` (N, M)
    of 0-based classes and `valid` (N, M) bool. The results are `positive` (N, P) bool, `matched`
    (N, P) int64, the column of each anchor's ground truth, and `label` (N, P), its class; `matched`
    and `label` are meaningless where `positive` is false.

    An anchor takes the ground truth of the highest IoU (the first of equals) and is positive if
    that IoU is above `match_iou`. Every ground truth also claims its best anchor, which is then
    positive.
    """
    # An empty box overlaps nothing, so padding never matches.
    zero = constant(0.0, boxes_xyxy.device)
    real_boxes = torch.where(valid.unsqueeze(-1), boxes_xyxy, zero)
    iou = pairwise_iou(real_boxes, anchors_xyxy)
    best_iou, best_box = first_max(iou, dim=1)

    claimant = claim_best_anchors(iou, valid)
    claimed = claimant >= 0
    matched = torch.where(claimed, claimant, best_box)
    positive = claimed | (best_iou > match_iou)
    return positive, matched, labels.gather(1, matched)


def claim_best_anchors(iou: Tensor, valid: Tensor) -> Tensor:
    """Let every valid box claim the anchor of highest IoU (N, M, P), the first of equals.

    Return the index of the box that claims each anchor, (N, P) int32, or -1. Of two boxes that
    claim the same anchor, the later gets it, and the earlier has no claim.
    """
    max_boxes = iou.shape[1]
    num_anchors = iou.shape[2]
    _, best_anchor = first_max(iou, dim=2)  # (N, M)
    box = torch.arange(max_boxes, device=iou.device)
    is_later = box > box.unsqueeze(1)  # (M, M): column comes after row
    same_anchor = best_anchor.unsqueeze(1) == best_anchor.unsqueeze(2)  # (N, M, M)
    overridden = (same_anchor & is_later & valid.unsqueeze(1)).any(dim=2)
    return write_claims(best_anchor, valid & ~overridden, num_anchors)


def pairwise_iou(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Return the IoU (N, M, P) of boxes (N, M, 4) with anchors (P, 4)."""
    left, top, right, bottom = boxes_xyxy.unsqueeze(2).unbind(-1)  # each (N, M, 1)
    anchor_left, anchor_top, anchor_right, anchor_bottom = anchors_xyxy.unbind(-1)  # each (P,)
    width = torch.minimum(right, anchor_right) - torch.maximum(left, anchor_left)
    height = torch.minimum(bottom, anchor_bottom) - torch.maximum(top, anchor_top)
    overlap = width.clamp(min=0) * height.clamp(min=0)
    area = (right - left) * (bottom - top)
    anchor_area = (anchor_right - anchor_left) * (anchor_bottom - anchor_top)
    return overlap / (area + anchor_area - overlap)
