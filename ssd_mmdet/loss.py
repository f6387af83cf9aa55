"""SSD's multibox loss: smooth L1 on offsets, cross entropy with hard negatives (paper section 2.2).

The normaliser is MMDetection's: a sum over the batch, an image without a positive counting 1.
Labels at this door are 0-based classes; the network's last channel is background.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.npu.device import chunk_size
from ssd_mmdet.anchors import encode, make_anchors
from ssd_mmdet.config import Recipe
from ssd_mmdet.targets import assign


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy (R,) of logits (R, C) and channels (R,), as torch's; backward runs once.

    Its gradient lies where the log-probabilities were. torch's needs two more arrays of that size,
    and on a CPU fresh memory for them takes longer than the arithmetic.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        column, log_probability = target.unsqueeze(1), logits.log_softmax(dim=1)
        ctx.save_for_backward(column, log_probability)
        return -log_probability.gather(1, column).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        column, log_probability = ctx.saved_tensors
        weight = gradient.unsqueeze(1)
        result = log_probability.exp_().mul_(weight)
        return result.scatter_(1, column, result.gather(1, column) - weight), None


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `outputs`: offsets (N, P, 4) and class logits (N, P, num_classes + 1); `boxes` (N, M, 4) xyxy in
    pixels of the network input; `labels` (N, M) 0-based; `valid` (N, M) bool. Returns scalars
    `loss_cls`, `loss_bbox` and their sum `loss`: sums over the batch divided by its positives.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe = recipe
        self.num_classes = num_classes
        anchors = make_anchors(recipe)
        # Stored by coordinate: the pairwise IoU reads contiguous rows.
        self.register_buffer("anchors", anchors.T.contiguous().T, persistent=False)

    def forward(
        self, outputs: tuple[Tensor, Tensor], boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        offsets, logits = (output.float() for output in outputs)
        positive, target, target_class = self.targets(boxes, labels, valid)
        positives = positive.sum(dim=1)

        box_loss = F.smooth_l1_loss(offsets, target, reduction="none").sum(dim=2)
        box_loss = torch.where(positive, box_loss, 0.0).sum()

        # As rows: over the middle axis a softmax takes three times as long.
        entropy = _CrossEntropy.apply(logits.flatten(0, 1), target_class.flatten())
        entropy = entropy.view_as(target_class)
        # Of the negatives the 3 per positive of highest loss: rank them, keep the first ones.
        negative = torch.where(positive, 0.0, entropy).sort(dim=1, descending=True).values
        rank = torch.arange(negative.shape[1], device=negative.device)
        hard = rank < (self.recipe.negative_ratio * positives).unsqueeze(1)
        class_loss = torch.where(positive, entropy, 0.0).sum()
        class_loss = class_loss + torch.where(hard, negative, 0.0).sum()

        count = positives.clamp(min=1).sum()
        loss_cls, loss_bbox = class_loss / count, box_loss / count
        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox, "loss": loss_cls + loss_bbox}

    @torch.no_grad()
    def targets(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`positive` (N, P) bool, target offsets (N, P, 4), target channels (N, P) int64."""
        at_once = chunk_size(boxes)
        parts = zip(boxes.split(at_once), labels.split(at_once), valid.split(at_once), strict=True)
        matches = [assign(self.anchors, *part, self.recipe.match_iou) for part in parts]
        positive, matched, label = (torch.cat(match) for match in zip(*matches, strict=True))
        target = boxes.gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
        target = encode(target, self.anchors, self.recipe)
        # Offsets of anchors without a match mean nothing: zero, so that none is ever infinite.
        target = torch.where(positive.unsqueeze(-1), target, 0.0)
        return positive, target, torch.where(positive, label, self.num_classes)
