"""Matching of padded ground truth to priors, batched, with fixed shapes (SSD paper section 2.2).

Small boxes lie inside many equal priors, whose overlaps are equal but for rounding: the order of
operations here, in fp32, is what decides between them as in the original.
"""

import torch
from torch import Tensor

SLOTS_AT_ONCE = 8  # what a CPU's cache holds of the pairwise overlaps


def pairwise_iou(boxes_ltrb: Tensor, anchors_ltrb: Tensor) -> Tensor:
    """IoU (N, M, P) of boxes (N, M, 4) with anchors (P, 4), both in corner form."""
    left, top, right, bottom = (side.unsqueeze(-1) for side in boxes_ltrb.unbind(-1))
    anchor_left, anchor_top, anchor_right, anchor_bottom = anchors_ltrb.unbind(-1)
    width = torch.minimum(right, anchor_right).sub_(torch.maximum(left, anchor_left))
    height = torch.minimum(bottom, anchor_bottom).sub_(torch.maximum(top, anchor_top))
    overlap = width.clamp_(min=0).mul_(height.clamp_(min=0))
    areas = (right - left) * (bottom - top)
    anchor_areas = (anchor_right - anchor_left) * (anchor_bottom - anchor_top)
    return overlap.div_((areas + anchor_areas).sub_(overlap))


def assign(
    anchors_ltrb: Tensor, boxes_ltrb: Tensor, labels: Tensor, valid: Tensor, match_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which ground truth each prior learns.

    `anchors_ltrb` (P, 4), `boxes_ltrb` (N, M, 4) normalised, `labels` (N, M) 0-based classes,
    `valid` (N, M) bool. Returns `positive` (N, P) bool, `matched` (N, P) int64, the index of each
    prior's ground truth, and `label` (N, P); the last two mean something where positive.

    A prior takes the ground truth of highest IoU (the first of equals) and is positive from
    `match_iou` on. Every ground truth also claims its best prior (the first of equals); where two
    claim the same one, the later has it.
    """
    images, slots = valid.shape
    # An empty box overlaps nothing, so padding never matches.
    boxes_ltrb = torch.where(valid.unsqueeze(-1), boxes_ltrb, 0.0)
    parts = boxes_ltrb.split(SLOTS_AT_ONCE, dim=1)
    iou = torch.cat([pairwise_iou(part, anchors_ltrb) for part in parts], dim=1)
    best_iou, matched = iou.max(dim=1)

    claimed = iou.argmax(dim=2)  # (N, M) prior of each ground truth
    slot = torch.arange(slots, device=valid.device)
    later = slot > slot.unsqueeze(1)  # [i, j]: j comes after i
    same = claimed.unsqueeze(1) == claimed.unsqueeze(2)
    outdone = (same & later & valid.unsqueeze(1)).any(dim=2)
    # Claims that do not count go to one column too many: no two real ones share a place, so the
    # result does not depend on the order of the scatter.
    priors = anchors_ltrb.shape[0]
    place = torch.where(valid & ~outdone, claimed, priors)
    claim = torch.full((images, priors + 1), -1, dtype=torch.int64, device=valid.device)
    claim = claim.scatter(1, place, slot.expand(images, slots))[:, :priors]

    forced = claim >= 0
    matched = torch.where(forced, claim, matched)
    positive = forced | (best_iou >= match_iou)
    return positive, matched, labels.gather(1, matched)
