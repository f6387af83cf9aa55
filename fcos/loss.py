"""The loss of FCOS: focal loss on classes, IoU or GIoU loss on boxes, centerness.

Source: FCOS paper, sections 3.1 and 3.2. The network has no background channel: a point that learns
no box should give all classes the probability 0.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fcos.anchors import MapSizes, encode, make_anchors, make_levels, point_strides
from fcos.config import Recipe
from fcos.model import Outputs
from fcos.targets import assign

# Lower limits of divisors and of the logarithm's argument, with their owners in MMDetection.
MIN_TOTAL_CENTERNESS = 1e-6  # FCOSHead
MIN_IOU = 1e-6  # IoULoss
MIN_UNION = 1e-6  # square pixels or strides, IoULoss
MIN_GIOU_AREA = 1e-7  # square pixels or strides, GIoULoss: union and enclosing box


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

    def forward(
        self, outputs: Outputs, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        logits, distances, centerness = outputs.flat()
        map_sizes = outputs.map_sizes()
        positive, label, target_distances = self.targets(map_sizes, boxes, labels, valid)
        # At other points distances mean nothing, and may be infinite. With the distance 1 in their
        # place, no term of the loss and no gradient is nan there.
        target_distances = torch.where(positive.unsqueeze(-1), target_distances, 1.0)
        distances = torch.where(positive.unsqueeze(-1), distances, 1.0)
        target_centerness = torch.where(positive, centerness_of(target_distances), 0.0)

        num_positives = positive.sum(dtype=torch.int32).float()
        total_centerness = target_centerness.sum()
        means = mean_over_ranks(torch.stack([num_positives, total_centerness]))
        class_divisor = means[0].clamp(min=1)
        box_divisor = means[1].clamp(min=MIN_TOTAL_CENTERNESS)

        focal = focal_loss(logits, label, positive, self.recipe.focal_alpha)
        loss_cls = focal.sum() / class_divisor

        box_loss = giou_loss if self.recipe.box_loss == "giou" else iou_loss
        weighted = box_loss(distances, target_distances) * target_centerness
        loss_bbox = weighted.sum() / box_divisor

        cross_entropy = F.binary_cross_entropy_with_logits(
            centerness.squeeze(-1), target_centerness, reduction="none"
        )
        loss_centerness = torch.where(positive, cross_entropy, 0.0).sum() / class_divisor
        return {
            "loss_cls": loss_cls,
            "loss_bbox": loss_bbox,
            "loss_centerness": loss_centerness,
            "loss": loss_cls + loss_bbox + loss_centerness,
        }

    @torch.no_grad()
    def targets(
        self, map_sizes: MapSizes, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each point should predict.

        The results are `positive` (N, P) bool, the class (N, P) int64, and the distances (N, P, 4)
        in the unit of the outputs. Where `positive` is false, the class is 0 and the distances are
        meaningless.
        """
        recipe = self.recipe
        device = boxes.device
        levels = make_levels(recipe, map_sizes, device)
        positive, matched, label = assign(levels, boxes, labels, valid, recipe.center_radius)
        label = torch.where(positive, label, 0)
        matched_boxes = boxes.gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
        distances = encode(matched_boxes, make_anchors(recipe, map_sizes, device))
        if recipe.norm_on_bbox:
            distances = distances / point_strides(recipe, map_sizes, device)
        return positive, label, distances


def focal_loss(logits: Tensor, label: Tensor, positive: Tensor, alpha: float) -> Tensor:
    """Return the focal loss (N, P, C) of logits (N, P, C), with gamma 2.

    The target is 1 for the class `label` (N, P) of a point where `positive` (N, P), and 0 for all
    other classes. Source: focal loss paper, equation 5.
    """
    classes = torch.arange(logits.shape[2], device=logits.device)
    is_target = (label.unsqueeze(-1) == classes) & positive.unsqueeze(-1)
    sign = torch.where(is_target, -1.0, 1.0)
    weight = torch.where(is_target, alpha, 1 - alpha)
    # The logit of the wrong answer: the higher it is, the worse is the prediction.
    wrong_logits = sign * logits
    wrong = wrong_logits.sigmoid()  # 1 - p_t in the paper
    cross_entropy = -F.logsigmoid(-wrong_logits)  # -log p_t; softplus has no gradient on an NPU
    return weight * wrong.square() * cross_entropy


def centerness_of(distances: Tensor) -> Tensor:
    """Return the centerness (...) of distances (..., 4) above 0; FCOS paper, equation 3."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the means of `values` over all ranks, all of which must call this."""
    if not dist.is_initialized():
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
