"""SSD's multibox loss: smooth L1 on offsets, cross entropy with hard negatives (paper section 2.2).

Labels at this door are 0-based classes; the network's channel 0 is background.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.device import chunk_size
from ssd_resnet34.anchors import encode, make_anchors, to_cxcywh, to_xyxy
from ssd_resnet34.config import Recipe
from ssd_resnet34.targets import assign


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `outputs`: offsets (N, 4, P) and class logits (N, 1 + num_classes, P); `boxes` (N, M, 4)
    normalised ltrb; `labels` (N, M) 0-based; `valid` (N, M) bool. Returns scalars `loss_cls`,
    `loss_bbox` and their sum `loss`. An image's loss is divided by its number of positive priors
    (0 without any), and the batch loss is the mean over all images.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe = recipe
        self.num_classes = num_classes
        anchors = make_anchors(recipe)
        self.register_buffer("anchors", anchors, persistent=False)
        # Stored by coordinate: the pairwise IoU reads contiguous rows.
        self.register_buffer("anchors_ltrb", to_xyxy(anchors).T.contiguous().T, persistent=False)

    def forward(
        self, outputs: tuple[Tensor, Tensor], boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        offsets, logits = (output.float() for output in outputs)
        positive, target, target_class = self.targets(boxes, labels, valid)
        positives = positive.sum(dim=1)

        box_loss = F.smooth_l1_loss(offsets, target, reduction="none").sum(dim=1)
        box_loss = torch.where(positive, box_loss, 0.0).sum(dim=1)

        entropy = F.cross_entropy(logits, target_class, reduction="none")
        # Of the negatives the 3 per positive of highest loss: rank them, keep the first ones.
        negative = torch.where(positive, 0.0, entropy).sort(dim=1, descending=True).values
        rank = torch.arange(negative.shape[1], device=negative.device)
        hard = rank < (self.recipe.negative_ratio * positives).unsqueeze(1)
        class_loss = torch.where(positive, entropy, 0.0).sum(dim=1)
        class_loss = class_loss + torch.where(hard, negative, 0.0).sum(dim=1)

        weight = torch.where(positives > 0, 1.0 / positives.clamp(min=1), 0.0)
        loss_bbox = (box_loss * weight).mean()
        loss_cls = (class_loss * weight).mean()
        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox, "loss": loss_cls + loss_bbox}

    @torch.no_grad()
    def targets(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`positive` (N, P) bool, target offsets (N, 4, P), target channels (N, P) int64."""
        at_once = chunk_size(boxes)
        parts = zip(boxes.split(at_once), labels.split(at_once), valid.split(at_once), strict=True)
        matches = [assign(self.anchors_ltrb, *part, self.recipe.match_iou) for part in parts]
        positive, matched, label = (torch.cat(match) for match in zip(*matches, strict=True))
        index = matched.unsqueeze(-1).expand(-1, -1, 4)
        target = encode(to_cxcywh(boxes).gather(1, index), self.anchors, self.recipe)
        # Offsets of priors without a match mean nothing: zero, so that none is ever infinite.
        target = torch.where(positive.unsqueeze(-1), target, 0.0).transpose(1, 2)
        return positive, target, torch.where(positive, label + 1, 0)
