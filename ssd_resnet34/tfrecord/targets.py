"""Matching of padded ground truth to default boxes, batched, with fixed shapes."""

import torch
from torch import Tensor

from ssd_resnet34.targets import pairwise_iou


def assign(
    anchors_ltrb: Tensor, boxes_ltrb: Tensor, labels: Tensor, valid: Tensor, match_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which ground truth each default box learns; arguments and result as the first recipe's.

    Two rules differ from it: a default box is positive from `match_iou` on, equality included, and
    where two ground truths claim the same default box, the earlier has it.
    """
    images, slots = valid.shape
    # An empty box overlaps nothing, so padding never matches.
    iou = pairwise_iou(torch.where(valid.unsqueeze(-1), boxes_ltrb, 0.0), anchors_ltrb)
    best_iou, matched = iou.max(dim=1)

    claimed = iou.argmax(dim=2)  # (N, M) default box of each ground truth
    slot = torch.arange(slots, device=valid.device)
    earlier = slot < slot.unsqueeze(1)  # [i, j]: j comes before i
    same = claimed.unsqueeze(1) == claimed.unsqueeze(2)
    outdone = (same & earlier & valid.unsqueeze(1)).any(dim=2)
    # Claims that do not count go to one column too many: no two real ones share a place, so the
    # result does not depend on the order of the scatter.
    count = anchors_ltrb.shape[0]
    place = torch.where(valid & ~outdone, claimed, count)
    claim = torch.full((images, count + 1), -1, dtype=torch.int64, device=valid.device)
    claim = claim.scatter(1, place, slot.expand(images, slots))[:, :count]

    forced = claim >= 0
    matched = torch.where(forced, claim, matched)
    positive = forced | (best_iou >= match_iou)
    return positive, matched, labels.gather(1, matched)
