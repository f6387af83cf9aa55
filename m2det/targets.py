"""Matching of padded ground truth to anchors, batched, with fixed shapes (SSD paper, section 2.2).

A small box lies inside many equal anchors, whose overlaps are equal but for rounding: the order of
the operations here, in fp32, decides between them as in the original.
"""

import torch
from torch import Tensor

from common.npu.operators import constant, first_max, write_claims


def pairwise_iou(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Return the IoU (N, M, P) of boxes (N, M, 4) with anchors (P, 4).

    It is computed in place: with a new array for each step the matching takes twice as long on a
    CPU (43 instead of 19 ms an image with 32 boxes and 32760 anchors).

    All boxes are compared at once: in parts they would be many small kernels. There are three
    arrays of N x M x P fp32 at a time, 0.6 GB for 16 images, 96 boxes (as many as COCO has in an
    image, rounded up) and 32760 anchors, of far more that the network keeps for its gradient.
    """
    left, top, right, bottom = boxes_xyxy.unsqueeze(2).unbind(-1)  # (N, M, 1) each
    anchor_left, anchor_top, anchor_right, anchor_bottom = anchors_xyxy.unbind(-1)  # (P,) each
    width = torch.minimum(right, anchor_right).sub_(torch.maximum(left, anchor_left))
    height = torch.minimum(bottom, anchor_bottom).sub_(torch.maximum(top, anchor_top))
    overlap = width.clamp_(min=0).mul_(height.clamp_(min=0))
    areas = (right - left) * (bottom - top)
    anchor_areas = (anchor_right - anchor_left) * (anchor_bottom - anchor_top)
    union = (areas + anchor_areas).sub_(overlap)
    return overlap.div_(union)


def assign(
    anchors_xyxy: Tensor, boxes_xyxy: Tensor, labels: Tensor, valid: Tensor, match_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which ground truth each anchor learns.

    The inputs are `anchors_xyxy` (P, 4), `boxes_xyxy` (N, M, 4), both normalised, `labels` (N, M)
    of 0-based classes and `valid` (N, M) bool. The results are `positive` (N, P) bool, `matched`
    (N, P) int64, the column of each anchor's ground truth, and `label` (N, P), its class; `matched`
    and `label` are meaningless where `positive` is false.

    An anchor takes the ground truth of the highest IoU (the first of equals) and is positive if
    that IoU is at least `match_iou`. Every ground truth also claims its best anchor (the first of
    equals), whatever the IoU. If several claim the same anchor, the last one gets it.
    """
    column = torch.arange(valid.shape[1], device=valid.device)

    # A box without area overlaps nothing, so padding never matches.
    boxes_xyxy = torch.where(valid.unsqueeze(-1), boxes_xyxy, constant(0.0, boxes_xyxy.device))
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
