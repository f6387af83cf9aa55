"""SSD's multibox loss: smooth L1 on offsets, cross entropy with hard negatives (paper section 2.2).

Labels at this door are 0-based classes; the network's channel 0 is background.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.device import chunk_size
from m2det.anchors import encode, make_anchors, to_cxcywh, to_ltrb
from m2det.config import Recipe
from m2det.targets import assign


class SoftmaxCrossEntropy(torch.autograd.Function):
    """Cross entropy (N, P) of logits (N, P, C) with classes (N, P), without kept probabilities.

    Equal to `F.cross_entropy` without reduction; it keeps nothing but its input and writes each
    gradient once, which halves its memory.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, classes: Tensor) -> Tensor:
        ctx.save_for_backward(logits, classes)
        parts = zip(*(x.split(chunk_size(x)) for x in (logits, classes)), strict=True)
        return torch.cat([-x.log_softmax(2).gather(2, c.unsqueeze(2)).squeeze(2) for x, c in parts])

    @staticmethod
    def backward(ctx, weight: Tensor):
        logits, classes = ctx.saved_tensors
        grads = torch.empty_like(logits)
        parts = (x.split(chunk_size(x)) for x in (grads, logits, classes, weight))
        for grad, x, c, w in zip(*parts, strict=True):
            torch.softmax(x, 2, out=grad).mul_(w.unsqueeze(2))
            grad.scatter_add_(2, c.unsqueeze(2), -w.unsqueeze(2))
        return grads, None


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `outputs`: offsets (N, P, 4) and class logits (N, P, 1 + num_classes); `boxes` (N, M, 4)
    normalised ltrb; `labels` (N, M) 0-based; `valid` (N, M) bool. Returns scalars `loss_cls`,
    `loss_bbox` and their sum `loss`: sums over the batch, divided by its number of positive
    priors (by 1 without any), of this process alone.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe = recipe
        self.num_classes = num_classes
        anchors = make_anchors(recipe)
        self.register_buffer("anchors", anchors, persistent=False)
        # Stored by coordinate: the pairwise IoU reads contiguous rows.
        self.register_buffer("anchors_ltrb", to_ltrb(anchors).T.contiguous().T, persistent=False)

    def forward(
        self, outputs: tuple[Tensor, Tensor], boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        offsets, logits = (output.float() for output in outputs)
        positive, target, target_class = self.targets(boxes, labels, valid)
        positives = positive.sum(dim=1)

        box_loss = F.smooth_l1_loss(offsets, target, reduction="none").sum(dim=2)
        box_loss = torch.where(positive, box_loss, 0.0).sum()

        entropy = SoftmaxCrossEntropy.apply(logits, target_class)
        # Of the negatives the 3 per positive of highest loss: rank them, keep the first ones.
        negative = torch.where(positive, 0.0, entropy).sort(dim=1, descending=True).values
        rank = torch.arange(negative.shape[1], device=negative.device)
        hard = rank < (self.recipe.negative_ratio * positives).unsqueeze(1)
        class_loss = torch.where(positive, entropy, 0.0).sum()
        class_loss = class_loss + torch.where(hard, negative, 0.0).sum()

        weight = 1.0 / positives.sum().clamp(min=1)
        loss_bbox, loss_cls = box_loss * weight, class_loss * weight
        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox, "loss": loss_cls + loss_bbox}

    @torch.no_grad()
    def targets(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`positive` (N, P) bool, target offsets (N, P, 4), target channels (N, P) int64."""
        at_once = chunk_size(boxes)
        parts = zip(boxes.split(at_once), labels.split(at_once), valid.split(at_once), strict=True)
        matches = [assign(self.anchors_ltrb, *part, self.recipe.match_iou) for part in parts]
        positive, matched, label = (torch.cat(match) for match in zip(*matches, strict=True))
        index = matched.unsqueeze(-1).expand(-1, -1, 4)
        target = encode(to_cxcywh(boxes).gather(1, index), self.anchors, self.recipe)
        # Offsets of priors without a match mean nothing: zero, so that none is ever infinite.
        target = torch.where(positive.unsqueeze(-1), target, 0.0)
        return positive, target, torch.where(positive, label + 1, 0)
