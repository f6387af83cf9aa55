"""Matching of padded ground truth to anchors, batched, with fixed shapes."""

import torch
from torch import Tensor

from common.npu.operators import constant, first_max, write_claims
from ssd_resnet34.targets import pairwise_iou


def assign(
    anchors_xyxy: Tensor, boxes_xyxy: Tensor, labels: Tensor, valid: Tensor, match_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which ground truth each anchor learns; inputs and results are the COCO recipe's.

    Two rules differ: an anchor is positive from `match_iou` on, equality included, and where two
    ground truths claim the same anchor, the earlier one gets it.
    """
    # An empty box overlaps nothing, so padding never matches.
    zero = constant(0.0, boxes_xyxy.device)
    real_boxes = torch.where(valid.unsqueeze(-1), boxes_xyxy, zero)
    iou = pairwise_iou(real_boxes, anchors_xyxy)
    best_iou, best_box = first_max(iou, dim=1)

    claimant = claim_best_anchors(iou, valid)
    claimed = claimant >= 0
    matched = torch.where(claimed, claimant, best_box)
    positive = claimed | (best_iou >= match_iou)
    return positive, matched, labels.gather(1, matched)


def claim_best_anchors(iou: Tensor, valid: Tensor) -> Tensor:
    """Let every valid box claim the anchor of highest IoU (N, M, P), the first of equals.

    Return the index of the box that claims each anchor, (N, P) int32, or -1. Of two boxes that
    claim the same anchor, the earlier gets it, and the later has no claim.
    """
    max_boxes = iou.shape[1]
    num_anchors = iou.shape[2]
    _, best_anchor = first_max(iou, dim=2)  # (N, M)
    box = torch.arange(max_boxes, device=iou.device)
    is_earlier = box < box.unsqueeze(1)  # (M, M): column comes before row
    same_anchor = best_anchor.unsqueeze(1) == best_anchor.unsqueeze(2)  # (N, M, M)
    overridden = (same_anchor & is_earlier & valid.unsqueeze(1)).any(dim=2)
    return write_claims(best_anchor, valid & ~overridden, num_anchors)
