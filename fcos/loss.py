"""FCOS's loss: focal loss on classes, IoU or GIoU on boxes, centerness (FCOS paper, 3.1 and 3.2).

Labels at this door are 0-based classes; the network has no background channel.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.device import chunk_size
from fcos.anchors import encode, make_anchors, make_levels, point_strides
from fcos.config import Recipe
from fcos.model import Outputs
from fcos.targets import assign

POINTS_AT_ONCE = 4096  # on a CPU: what fits its cache


class FocalLoss(torch.autograd.Function):
    """Sum of the sigmoid focal loss (gamma 2) of logits (N, P, C) for `label` (N, P) where
    `positive` (N, P), background elsewhere.

    Every entry is first taken as background, then the one class of each positive point is
    corrected: no one-hot target. The gradient is made in the forward pass, where its parts are at
    hand. Focal loss paper, equation 5.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, label: Tensor, positive: Tensor, alpha: float) -> Tensor:
        grads = torch.empty_like(logits)
        total = logits.new_zeros(())
        rows, row_grads = logits.flatten(0, 1), grads.flatten(0, 1)
        step = POINTS_AT_ONCE * chunk_size(rows)
        for grad, x in zip(row_grads.split(step), rows.split(step), strict=True):
            p, q, cost = _background_cost(x)
            weight = (p * p).mul_(1 - alpha)
            total = total + (weight * cost).sum()
            # d/dx p^2 cost = p^2 (2 q cost + p)
            torch.addcmul(p, q.mul_(2), cost, out=grad).mul_(weight)

        index = label.unsqueeze(-1)
        x = logits.gather(2, index).squeeze(-1)  # (N, P)
        p, q, cost_background = _background_cost(x)
        cost = cost_background - x  # -log p
        change = alpha * q * q * cost - (1 - alpha) * p * p * cost_background
        total = total + torch.where(positive, change, 0.0).sum()
        change = -alpha * q * q * (2 * p * cost + q)
        change = change - (1 - alpha) * p * p * (2 * q * cost_background + p)
        grads.scatter_add_(2, index, torch.where(positive, change, 0.0).unsqueeze(-1))
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weight: Tensor):
        (grads,) = ctx.saved_tensors
        return grads * weight, None, None, None


def _background_cost(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probability p of logits, q = 1 - p, and -log q, which is `F.softplus` at a third of its
    time; never below the logit, so that it stays right where q vanishes."""
    p, q = x.sigmoid(), (-x).sigmoid_()
    cost = q.clamp(min=1e-37).log_().neg_()
    return p, q, torch.maximum(cost, x, out=cost)


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `boxes` (N, M, 4) xyxy in pixels of the input; `labels` (N, M) 0-based; `valid` (N, M) bool.
    Returns scalars `loss_cls`, `loss_bbox`, `loss_centerness` and their sum `loss`. Classes and
    centerness are divided by the number of positive points, boxes by the sum of their centerness,
    both the mean over ranks: every rank takes part in that, whatever its ground truth.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe = recipe
        self.num_classes = num_classes

    def forward(
        self, outputs: Outputs, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        logits, distances, centerness = outputs.flat()
        sizes = outputs.sizes()
        positive, label, target = self.targets(sizes, boxes, labels, valid)
        # Distances of background points mean nothing, and may be infinite: a box of size 2 instead.
        target = torch.where(positive.unsqueeze(-1), target, 1.0)
        distances = torch.where(positive.unsqueeze(-1), distances, 1.0)
        target_centerness = torch.where(positive, center_of(target), 0.0)
        positives, weights = _mean_over_ranks(positive.sum(), target_centerness.sum())
        positives, weights = positives.clamp(min=1), weights.clamp(min=1e-6)

        label = torch.where(positive, label, 0)
        loss_cls = FocalLoss.apply(logits, label, positive, self.recipe.focal_alpha) / positives
        box_loss = giou_loss if self.recipe.box_loss == "giou" else iou_loss
        loss_bbox = (box_loss(distances, target) * target_centerness).sum() / weights
        entropy = F.binary_cross_entropy_with_logits(
            centerness.squeeze(-1), target_centerness, reduction="none"
        )
        loss_centerness = torch.where(positive, entropy, 0.0).sum() / positives
        return {
            "loss_cls": loss_cls,
            "loss_bbox": loss_bbox,
            "loss_centerness": loss_centerness,
            "loss": loss_cls + loss_bbox + loss_centerness,
        }

    @torch.no_grad()
    def targets(
        self, sizes: tuple, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`positive` (N, P) bool, class (N, P) int64, `num_classes` for background, and target
        distances (N, P, 4) in the unit of the outputs, which mean something where positive."""
        recipe, device = self.recipe, boxes.device
        levels = make_levels(recipe, sizes, device)
        at_once = chunk_size(boxes)
        parts = zip(boxes.split(at_once), labels.split(at_once), valid.split(at_once), strict=True)
        matches = [assign(levels, *part, recipe.center_radius) for part in parts]
        positive, matched, label = (torch.cat(match) for match in zip(*matches, strict=True))
        matched_boxes = boxes.gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
        target = encode(matched_boxes, make_anchors(recipe, sizes, device))
        if recipe.norm_on_bbox:
            target = target / point_strides(recipe, sizes, device)
        return positive, torch.where(positive, label, self.num_classes), target


def center_of(distances: Tensor) -> Tensor:
    """Centerness (...) of distances (..., 4), above 0; FCOS paper equation 3."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    return (across * (torch.minimum(top, bottom) / torch.maximum(top, bottom))).sqrt()


def _mean_over_ranks(*values: Tensor) -> Tensor:
    """The means over ranks, in one collective that every rank enters."""
    means = torch.stack([value.float() for value in values])
    if dist.is_initialized():
        means = means / dist.get_world_size()
        dist.all_reduce(means)
    return means


def iou_loss(distances: Tensor, target: Tensor) -> Tensor:
    """-log IoU (...) of two boxes around the same point; IoU is at least 1e-6."""
    overlap, union, _ = _overlap(distances, target)
    return -(overlap / union.clamp(min=1e-6)).clamp(min=1e-6).log()


def giou_loss(distances: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU (...) of two boxes around the same point; GIoU paper, algorithm 1."""
    overlap, union, hull = _overlap(distances, target)
    union, hull = union.clamp(min=1e-7), hull.clamp(min=1e-7)
    return 1 - overlap / union + (hull - union) / hull


def _overlap(distances: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of overlap, union and common hull of boxes given by distances from the same point."""

    def area(ltrb: Tensor) -> Tensor:
        left, top, right, bottom = ltrb.unbind(-1)
        return (left + right) * (top + bottom)

    overlap = area(torch.minimum(distances, target))
    union = area(distances) + area(target) - overlap
    return overlap, union, area(torch.maximum(distances, target))
