"""The loss of FCOS: focal loss on classes, IoU or GIoU loss on boxes, centerness.

Source: FCOS paper, sections 3.1 and 3.2. The network has no background channel: a point that learns
no box should give all classes the probability 0.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu import distributed
from common.npu.operators import constant
from fcos.anchors import MapSizes, encode, make_anchors, make_axes, map_sizes, point_strides
from fcos.config import Recipe
from fcos.model import Outputs
from fcos.targets import assign

# Lower limits of divisors and of the logarithm's argument, with their owners in MMDetection.
MIN_TOTAL_CENTERNESS = 1e-6  # FCOSHead
MIN_IOU = 1e-6  # IoULoss
MIN_UNION = 1e-6  # square pixels or strides, IoULoss
MIN_GIOU_AREA = 1e-7  # square pixels or strides, GIoULoss: union and enclosing box

BACKGROUND = -1  # instead of a class


class Divisors(NamedTuple):
    """What the sums over a batch are divided by, 0-dim: means over all ranks."""

    classes: Tensor  # also of centerness: the number of positive points
    boxes: Tensor  # their target centerness


class DetectionLoss(nn.Module):
    """Loss of raw outputs against padded ground truth, in fp32, with fixed shapes.

    `boxes` (N, M, 4) are xyxy in pixels of the network input, `labels` (N, M) 0-based classes and
    `valid` (N, M) bool. The result has the scalars `loss_cls`, `loss_bbox`, `loss_centerness` and
    their sum `loss`.

    The losses of classes and centerness are divided by the number of positive points, that of boxes
    by the sum of their target centerness. Both divisors are means over all ranks.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.recipe = recipe
        self.register_buffer("classes", torch.arange(num_classes), persistent=False)

    def forward(
        self,
        outputs: Outputs,
        boxes: Tensor,
        labels: Tensor,
        valid: Tensor,
        normaliser: Divisors | None = None,
    ) -> dict[str, Tensor]:
        logits, distances, centerness = outputs.flat()
        sizes = outputs.map_sizes()
        positive, label, target_distances = self.targets(sizes, boxes, labels, valid)
        # At other points distances mean nothing, and may be infinite. With the distance 1 in their
        # place, no term of the loss and no gradient is nan there.
        one = constant(1.0, distances.device)
        target_distances = torch.where(positive.unsqueeze(-1), target_distances, one)
        distances = torch.where(positive.unsqueeze(-1), distances, one)
        is_positive = positive.float()
        target_centerness = centerness_of(target_distances) * is_positive
        if normaliser is None:
            normaliser = divisors(is_positive, target_centerness)

        is_target = label.unsqueeze(-1) == self.classes
        focal = focal_loss(logits, is_target, self.recipe.focal_alpha)
        loss_cls = focal.sum() / normaliser.classes

        box_loss = giou_loss if self.recipe.box_loss == "giou" else iou_loss
        weighted = box_loss(distances, target_distances) * target_centerness
        loss_bbox = weighted.sum() / normaliser.boxes

        cross_entropy = F.binary_cross_entropy_with_logits(
            centerness.squeeze(-1), target_centerness, weight=is_positive, reduction="sum"
        )
        loss_centerness = cross_entropy / normaliser.classes
        return {
            "loss_cls": loss_cls,
            "loss_bbox": loss_bbox,
            "loss_centerness": loss_centerness,
            "loss": loss_cls + loss_bbox + loss_centerness,
        }

    @torch.no_grad()
    def normaliser(self, images: Tensor, boxes: Tensor, labels: Tensor, valid: Tensor) -> Divisors:
        """Return what sums over a batch are divided by; all ranks must call this.

        The parts of the batch are given it, so that their losses add up to that of the batch.
        """
        sizes = map_sizes(self.recipe, *images.shape[2:])
        positive, _, target_distances = self.targets(sizes, boxes, labels, valid)
        one = constant(1.0, images.device)
        target_distances = torch.where(positive.unsqueeze(-1), target_distances, one)
        is_positive = positive.float()
        return divisors(is_positive, centerness_of(target_distances) * is_positive)

    @torch.no_grad()
    def targets(
        self, sizes: MapSizes, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each point should predict.

        The results are `positive` (N, P) bool, the class (N, P) int64, and the distances (N, P, 4)
        in the unit of the outputs. Where `positive` is false, the class is BACKGROUND and the
        distances are meaningless.
        """
        recipe = self.recipe
        device = boxes.device
        axes = make_axes(recipe, sizes, device)
        positive, matched, label = assign(axes, boxes, labels, valid, recipe.center_radius)
        label = torch.where(positive, label, constant(BACKGROUND, device))
        matched_boxes = boxes.gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
        distances = encode(matched_boxes, make_anchors(recipe, sizes, device))
        if recipe.norm_on_bbox:
            distances = distances / point_strides(recipe, sizes, device)
        return positive, label, distances


def focal_loss(logits: Tensor, is_target: Tensor, alpha: float) -> Tensor:
    """Return the focal loss (N, P, C) of logits (N, P, C), with gamma 2.

    `is_target` (N, P, C) bool says where the class of a point should have the probability 1; it
    should be 0 elsewhere. Source: focal loss paper, equation 5.
    """
    device = logits.device
    sign = torch.where(is_target, constant(1.0, device), constant(-1.0, device))
    # Below 0, since the logarithm of a probability is.
    weight = torch.where(is_target, constant(-alpha, device), constant(alpha - 1, device))
    # The logit of the right answer: the higher it is, the better is the prediction.
    right_logits = sign * logits
    wrong = (-right_logits).sigmoid()  # 1 - p_t in the paper
    log_right = F.logsigmoid(right_logits)  # log p_t; softplus has no gradient on an NPU
    return weight * wrong.square() * log_right


def centerness_of(distances: Tensor) -> Tensor:
    """Return the centerness (...) of distances (..., 4) above 0; FCOS paper, equation 3."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()


def divisors(is_positive: Tensor, target_centerness: Tensor) -> Divisors:
    """Return the divisors of points (N, P); all ranks must call this."""
    num_positives = is_positive.sum()  # exact: a batch has fewer than 2^24 points
    means = mean_over_ranks(torch.stack([num_positives, target_centerness.sum()]))
    return Divisors(classes=means[0].clamp(min=1), boxes=means[1].clamp(min=MIN_TOTAL_CENTERNESS))


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the means of `values` over all ranks, all of which must call this."""
    if not distributed.exchanges():
        return values
    values = values / dist.get_world_size()
    dist.all_reduce(values)
    return values


def iou_loss(distances: Tensor, target: Tensor) -> Tensor:
    """Return -log IoU (...) of two boxes around the same point, both (..., 4) distances."""
    overlap = area(torch.minimum(distances, target))
    union = area(distances) + area(target) - overlap
    iou = overlap / union.clamp(min=MIN_UNION)
    return -iou.clamp(min=MIN_IOU).log()


def giou_loss(distances: Tensor, target: Tensor) -> Tensor:
    """Return 1 - GIoU (...) of two boxes around the same point, both (..., 4) distances.

    Source: GIoU paper, algorithm 1.
    """
    overlap = area(torch.minimum(distances, target))
    union = area(distances) + area(target) - overlap
    union = union.clamp(min=MIN_GIOU_AREA)
    enclosing = area(torch.maximum(distances, target)).clamp(min=MIN_GIOU_AREA)
    iou = overlap / union
    return 1 - iou + (enclosing - union) / enclosing


def area(distances: Tensor) -> Tensor:
    """Return the area (...) of the boxes that have these distances (..., 4) from a point."""
    left, top, right, bottom = distances.unbind(-1)
    return (left + right) * (top + bottom)
