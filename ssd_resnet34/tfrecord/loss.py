"""Multibox loss of the TFRecord recipe, and the weight-decay term of its printed loss."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.device import chunk_size
from ssd_resnet34.tfrecord.anchors import encode, make_anchors
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.targets import assign


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `outputs`: deltas (N, 4, P) and class logits (N, 1 + num_classes, P), of which channel 0 is
    background; `boxes` (N, M, 4) normalised xyxy; `labels` (N, M) 0-based; `valid` (N, M) bool.
    Returns the scalars `loss_cls`, `loss_bbox` and their sum `loss`. The loss of an image is
    divided by its number of positive anchors, at least 1; the batch loss is the mean of all images.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe = recipe
        self.num_classes = num_classes
        # Stored coordinate by coordinate, because the pairwise IoU reads contiguous rows.
        anchors = make_anchors(recipe).T.contiguous().T
        self.register_buffer("anchors_xyxy", anchors, persistent=False)

    def forward(
        self, outputs: tuple[Tensor, Tensor], boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        deltas = outputs[0].float()
        logits = outputs[1].float()
        positive, target_deltas, target_channels = self.targets(boxes, labels, valid)
        num_positives = positive.sum(dim=1).clamp(min=1)

        box_losses = F.smooth_l1_loss(deltas, target_deltas, reduction="none").sum(dim=1)
        box_loss = torch.where(positive, box_losses, 0.0).sum(dim=1)

        class_losses = F.cross_entropy(logits, target_channels, reduction="none")
        positive_loss = torch.where(positive, class_losses, 0.0).sum(dim=1)
        # Only the hardest negatives of an image count.
        negative_losses = torch.where(positive, 0.0, class_losses)
        negative_losses = negative_losses.sort(dim=1, descending=True).values
        rank = torch.arange(negative_losses.shape[1], device=negative_losses.device)
        num_negatives = self.recipe.negative_ratio * num_positives + self.recipe.extra_negatives
        is_hard = rank < num_negatives.unsqueeze(1)
        class_loss = positive_loss + torch.where(is_hard, negative_losses, 0.0).sum(dim=1)

        loss_bbox = (box_loss / num_positives).mean()
        loss_cls = (class_loss / num_positives).mean()
        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox, "loss": loss_cls + loss_bbox}

    @torch.no_grad()
    def targets(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each anchor is to predict.

        `positive` (N, P) bool, target deltas (N, 4, P), zero for the other anchors, and target
        channels (N, P) int64, where 0 is background.
        """
        positive, matched, matched_labels = self._assign(boxes, labels, valid)
        matched_boxes = boxes.gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
        deltas = encode(matched_boxes, self.anchors_xyxy, self.recipe)
        target_deltas = torch.where(positive.unsqueeze(-1), deltas, 0.0).transpose(1, 2)
        target_channels = torch.where(positive, matched_labels + 1, 0)
        return positive, target_deltas, target_channels

    def _assign(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Match a batch. A CPU does it image by image: a third of the time, for a batch's IoUs do
        not fit its cache (2.6 instead of 8.9 ms an image, of a step of CHUNKSTEP ms)."""
        size = chunk_size(boxes)
        chunks = zip(boxes.split(size), labels.split(size), valid.split(size), strict=True)
        results = []
        for chunk_boxes, chunk_labels, chunk_valid in chunks:
            result = assign(
                self.anchors_xyxy, chunk_boxes, chunk_labels, chunk_valid, self.recipe.match_iou
            )
            results.append(result)
        positive, matched, matched_labels = zip(*results, strict=True)
        return torch.cat(positive), torch.cat(matched), torch.cat(matched_labels)


@torch.no_grad()
def decay_term(parameters: Iterable[Tensor], weight_decay: float) -> Tensor:
    """Return the weight-decay term of the printed loss; the optimiser adds its gradient itself."""
    return weight_decay / 2 * nn.utils.get_total_norm(parameters).square()
