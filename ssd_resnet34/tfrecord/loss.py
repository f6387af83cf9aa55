"""Multibox loss of the TFRecord recipe, and the weight-decay term of its printed loss.

Labels at this door are 0-based classes; the network's channel 0 is background.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.device import chunk_size
from ssd_resnet34.loss import SoftmaxCrossEntropy
from ssd_resnet34.tfrecord.anchors import encode, make_anchors
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.targets import assign


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `outputs`: codes (N, 4, P) and class logits (N, 1 + num_classes, P); `boxes` (N, M, 4)
    normalised ltrb; `labels` (N, M) 0-based; `valid` (N, M) bool. Returns scalars `loss_cls`,
    `loss_bbox` and their sum `loss`. An image's loss is divided by its number of positive default
    boxes, at least 1; the batch loss is the mean over all images.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe = recipe
        self.num_classes = num_classes
        # Stored by coordinate: the pairwise IoU reads contiguous rows.
        anchors = make_anchors(recipe).T.contiguous().T
        self.register_buffer("anchors_ltrb", anchors, persistent=False)

    def forward(
        self, outputs: tuple[Tensor, Tensor], boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        codes, logits = (output.float() for output in outputs)
        positive, target, target_class = self.targets(boxes, labels, valid)
        positives = positive.sum(dim=1).clamp(min=1)

        box_loss = F.smooth_l1_loss(codes, target, reduction="none").sum(dim=1)
        box_loss = torch.where(positive, box_loss, 0.0).sum(dim=1)

        entropy = SoftmaxCrossEntropy.apply(logits, target_class)
        negative = torch.where(positive, 0.0, entropy).sort(dim=1, descending=True).values
        rank = torch.arange(negative.shape[1], device=negative.device)
        hardest = self.recipe.negative_ratio * positives + self.recipe.extra_negatives
        class_loss = torch.where(positive, entropy, 0.0).sum(dim=1)
        class_loss += torch.where(rank < hardest.unsqueeze(1), negative, 0.0).sum(dim=1)

        loss_bbox = (box_loss / positives).mean()
        loss_cls = (class_loss / positives).mean()
        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox, "loss": loss_cls + loss_bbox}

    @torch.no_grad()
    def targets(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`positive` (N, P) bool, target codes (N, 4, P), target channels (N, P) int64."""
        at_once = chunk_size(boxes)
        parts = zip(boxes.split(at_once), labels.split(at_once), valid.split(at_once), strict=True)
        matches = [assign(self.anchors_ltrb, *part, self.recipe.match_iou) for part in parts]
        positive, matched, label = (torch.cat(match) for match in zip(*matches, strict=True))
        index = matched.unsqueeze(-1).expand(-1, -1, 4)
        target = encode(boxes.gather(1, index), self.anchors_ltrb, self.recipe)
        target = torch.where(positive.unsqueeze(-1), target, 0.0).transpose(1, 2)
        return positive, target, torch.where(positive, label + 1, 0)


@torch.no_grad()
def decay_term(parameters: Iterable[Tensor], weight_decay: float) -> Tensor:
    """What weight decay adds to the printed loss; the optimiser has its gradient already."""
    return weight_decay / 2 * nn.utils.get_total_norm(parameters).square()
