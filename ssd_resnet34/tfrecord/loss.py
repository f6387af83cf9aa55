"""Multibox loss of the TFRecord recipe, and the weight-decay term of its printed loss."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.operators import constant, descending
from ssd_resnet34.loss import mean_of_images
from ssd_resnet34.tfrecord.anchors import encode, make_anchors
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.targets import assign


class DetectionLoss(nn.Module):
    """The loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `outputs` are deltas (N, 4, P) and logits (N, 1 + num_classes, P), whose channel 0 is the
    background. `boxes` (N, M, 4) are normalised xyxy, `labels` (N, M) 0-based classes and `valid`
    (N, M) bool. The result has the scalars `loss_cls`, `loss_bbox` and their sum `loss`.

    The loss of an image is divided by its number of positive anchors, at least 1; the loss of a
    batch is the mean over all its images.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        # The call is the same in all models; this loss does not need the number of classes.
        super().__init__()
        self.recipe = recipe
        self.register_buffer("anchors_xyxy", make_anchors(recipe), persistent=False)

    def forward(
        self,
        outputs: tuple[Tensor, Tensor],
        boxes: Tensor,
        labels: Tensor,
        valid: Tensor,
        normaliser: Tensor | None = None,
    ) -> dict[str, Tensor]:
        deltas, logits = outputs
        zero = constant(0.0, boxes.device)
        positive, target_deltas, target_channels = self.targets(boxes, labels, valid)
        num_positives = positive.sum(dim=1, dtype=torch.int32).clamp(min=1)

        smooth_l1 = F.smooth_l1_loss(deltas.float(), target_deltas, reduction="none").sum(dim=1)
        box_loss = torch.where(positive, smooth_l1, zero).sum(dim=1)

        # Flat, in the order that the network has them in: nothing is copied.
        flat_logits = logits.float().transpose(1, 2).flatten(0, 1)
        cross_entropy = F.cross_entropy(flat_logits, target_channels.flatten(), reduction="none")
        cross_entropy = cross_entropy.view_as(target_channels)
        positive_loss = torch.where(positive, cross_entropy, zero).sum(dim=1)
        # Of the negatives, those of highest loss count.
        negative_loss = torch.where(positive, zero, cross_entropy)
        hardest_first = descending(negative_loss)
        rank = torch.arange(hardest_first.shape[1], dtype=torch.int32, device=hardest_first.device)
        num_negatives = self.recipe.negative_ratio * num_positives + self.recipe.extra_negatives
        is_hard = rank < num_negatives.unsqueeze(1)
        class_loss = positive_loss + torch.where(is_hard, hardest_first, zero).sum(dim=1)

        loss_bbox = mean_of_images(box_loss / num_positives, normaliser)
        loss_cls = mean_of_images(class_loss / num_positives, normaliser)
        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox, "loss": loss_cls + loss_bbox}

    def normaliser(self, images: Tensor, boxes: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Return what sums over a batch are divided by, 0-dim: the number of its images.

        The parts of the batch are given it, so that their losses add up to that of the batch.
        """
        # The call is the same in all models; this loss does not need the boxes.
        return constant(float(len(images)), images.device)

    @torch.no_grad()
    def targets(
        self, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each anchor is to learn.

        `positive` (N, P) bool, target deltas (N, 4, P), 0 where an anchor is not positive, and
        target channels (N, P) int64, which are 0 for background and a class's label + 1.
        """
        positive, matched, label = assign(
            self.anchors_xyxy, boxes, labels, valid, self.recipe.match_iou
        )
        index = matched.unsqueeze(-1).expand(-1, -1, 4)
        deltas = encode(boxes.gather(1, index), self.anchors_xyxy, self.recipe)
        deltas = torch.where(positive.unsqueeze(-1), deltas, constant(0.0, boxes.device))
        channels = torch.where(positive, label + 1, constant(0, boxes.device))
        return positive, deltas.transpose(1, 2), channels


@torch.no_grad()
def decay_term(parameters: Iterable[Tensor], weight_decay: float) -> Tensor:
    """Return the weight-decay term of the printed loss; the optimiser adds its gradient itself.

    Parameters that do not train have none.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return weight_decay / 2 * nn.utils.get_total_norm(trained).square()
