"""The loss of SSD: smooth L1 on box deltas, cross entropy with hard negatives.

Source: SSD paper, section 2.2. Labels are 0-based classes; channel 0 of the network's logits is the
background.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.operators import constant, descending
from m2det.anchors import encode, make_anchors, to_cxcywh, to_xyxy
from m2det.config import Recipe
from m2det.targets import assign


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `outputs` are deltas (N, P, 4) and class logits (N, P, 1 + num_classes). `boxes` (N, M, 4) are
    normalised xyxy, `labels` (N, M) 0-based classes and `valid` (N, M) bool. The result has the
    scalars `loss_cls`, `loss_bbox` and their sum `loss`: sums over the batch, divided by its number
    of positive anchors (by 1 without any), of this process alone.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        # The call is the same in all models; this loss does not need the number of classes.
        super().__init__()
        self.recipe = recipe
        anchors = make_anchors(recipe)
        self.register_buffer("anchors", anchors, persistent=False)
        # Stored by coordinate: the pairwise IoU reads contiguous rows.
        anchors_xyxy = to_xyxy(anchors).T.contiguous().T
        self.register_buffer("anchors_xyxy", anchors_xyxy, persistent=False)

    def forward(
        self,
        outputs: tuple[Tensor, Tensor],
        boxes: Tensor,
        labels: Tensor,
        valid: Tensor,
        normaliser: Tensor | None = None,
    ) -> dict[str, Tensor]:
        deltas, logits = outputs
        deltas = deltas.float()
        logits = logits.float()
        positive, target_deltas, target_channels = self.targets(boxes, labels, valid)
        num_positives = positive.sum(dim=1, dtype=torch.int32)
        if normaliser is None:
            normaliser = self._normaliser(num_positives)

        box_loss = F.smooth_l1_loss(deltas, target_deltas, reduction="none").sum(dim=2)
        zero = constant(0.0, deltas.device)
        loss_bbox = torch.where(positive, box_loss, zero).sum() / normaliser

        # Flat, because a softmax over the middle one of three axes is much slower.
        flat_cross_entropy = F.cross_entropy(
            logits.flatten(0, 1), target_channels.flatten(), reduction="none"
        )
        cross_entropy = flat_cross_entropy.view_as(target_channels)
        positive_loss = torch.where(positive, cross_entropy, zero).sum()
        negative_loss = self.hard_negatives(cross_entropy, positive, num_positives).sum()
        loss_cls = (positive_loss + negative_loss) / normaliser

        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox, "loss": loss_cls + loss_bbox}

    def normaliser(self, images: Tensor, boxes: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Return what sums over a batch are divided by, 0-dim.

        The parts of the batch are given it, so that their losses add up to that of the batch.
        """
        # The call is the same in all models; this loss does not need the images.
        positive, _, _ = self.targets(boxes, labels, valid)
        return self._normaliser(positive.sum(dim=1, dtype=torch.int32))

    def _normaliser(self, num_positives: Tensor) -> Tensor:
        """Return the number of positives (N,) of all images, at least 1."""
        return num_positives.sum(dtype=torch.int32).clamp(min=1)

    def hard_negatives(
        self, cross_entropy: Tensor, positive: Tensor, num_positives: Tensor
    ) -> Tensor:
        """Return the losses (N, P) of the hardest negatives of each image in descending order.

        They are followed by zeros; columns are ranks, not anchors. `negative_ratio` negatives count
        for each positive.
        """
        zero = constant(0.0, cross_entropy.device)
        negative_loss = torch.where(positive, zero, cross_entropy)
        hardest_first = descending(negative_loss)
        rank = torch.arange(hardest_first.shape[1], dtype=torch.int32, device=hardest_first.device)
        num_negatives = self.recipe.negative_ratio * num_positives
        return torch.where(rank < num_negatives.unsqueeze(1), hardest_first, zero)

    @torch.no_grad()
    def targets(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `positive` (N, P) bool, the deltas (N, P, 4) and the channels (N, P) to learn."""
        positive, matched, label = assign(
            self.anchors_xyxy, boxes, labels, valid, self.recipe.match_iou
        )
        matched_boxes = to_cxcywh(boxes).gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
        deltas = encode(matched_boxes, self.anchors, self.recipe)
        # Anchors without a match may have been paired with padding, whose deltas can be infinite.
        deltas = torch.where(positive.unsqueeze(-1), deltas, constant(0.0, deltas.device))
        channels = torch.where(positive, label + 1, constant(0, label.device))
        return positive, deltas, channels
