"""The loss of SSD: smooth L1 on box deltas, cross entropy with hard negatives.

Source: SSD paper, section 2.2. The normaliser is MMDetection's: the number of positives in the
batch, where an image without a positive counts as one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.operators import constant, descending
from ssd_mmdet.anchors import encode, make_anchors
from ssd_mmdet.config import Recipe
from ssd_mmdet.targets import assign


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `outputs` are deltas (N, P, 4) and class logits (N, P, num_classes + 1), of which the last
    channel is the background. `boxes` (N, M, 4) are xyxy in pixels of the network input, `labels`
    (N, M) 0-based classes and `valid` (N, M) bool. The result has the scalars `loss_cls`,
    `loss_bbox` and their sum `loss`.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe = recipe
        self.background = num_classes
        self.register_buffer("anchors", make_anchors(recipe), persistent=False)

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
        zero = constant(0.0, boxes.device)
        positive, target_deltas, target_channels = self.targets(boxes, labels, valid)
        num_positives = positive.sum(dim=1, dtype=torch.int32)
        if normaliser is None:
            normaliser = self._normaliser(num_positives)

        box_loss = F.smooth_l1_loss(deltas, target_deltas, reduction="none").sum(dim=2)
        loss_bbox = torch.where(positive, box_loss, zero).sum() / normaliser

        # Flat, because a softmax over the middle one of three axes is much slower.
        flat_logits = logits.flatten(0, 1)
        cross_entropy = F.cross_entropy(flat_logits, target_channels.flatten(), reduction="none")
        cross_entropy = cross_entropy.view_as(target_channels)
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
        """Return the number of positives (N,) of all images, at least 1 of each."""
        return num_positives.clamp(min=1).sum(dtype=torch.int32)

    def hard_negatives(
        self, cross_entropy: Tensor, positive: Tensor, num_positives: Tensor
    ) -> Tensor:
        """Return the losses (N, P) of the hardest negatives of each image.

        They are in descending order, followed by zeros: columns are ranks, not anchors.
        `negative_ratio` negatives count for each of the `num_positives` (N,).
        """
        zero = constant(0.0, cross_entropy.device)
        hardest_first = descending(torch.where(positive, zero, cross_entropy))
        rank = torch.arange(hardest_first.shape[1], dtype=torch.int32, device=hardest_first.device)
        num_negatives = self.recipe.negative_ratio * num_positives
        return torch.where(rank < num_negatives.unsqueeze(1), hardest_first, zero)

    @torch.no_grad()
    def targets(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `positive` (N, P) bool, the deltas (N, P, 4) and the channels (N, P) to learn."""
        positive, matched, label = assign(self.anchors, boxes, labels, valid, self.recipe.match_iou)
        matched_boxes = boxes.gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
        deltas = encode(matched_boxes, self.anchors, self.recipe)
        # Anchors without a match may have been paired with padding, whose deltas can be infinite.
        deltas = torch.where(positive.unsqueeze(-1), deltas, constant(0.0, boxes.device))
        channels = torch.where(positive, label, constant(self.background, boxes.device))
        return positive, deltas, channels
