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
        self.num_classes = num_classes

    def forward(
        self, outputs: Outputs, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        logits, distances, centerness = outputs.flat()
        sizes = outputs.map_sizes()
        positive, label, target_distances = self.targets(sizes, boxes, labels, valid)
        # At other points distances mean nothing, and may be infinite. With the distance 1 in their
        # place, no term of the loss and no gradient is nan there.
        target_distances = torch.where(positive.unsqueeze(-1), target_distances, 1.0)
        distances = torch.where(positive.unsqueeze(-1), distances, 1.0)
        target_centerness = torch.where(positive, centerness_of(target_distances), 0.0)

        positives = positive.sum().float()
        total_centerness = target_centerness.sum()
        divisors = mean_over_ranks(torch.stack([positives, total_centerness]))
        positives = divisors[0].clamp(min=1)
        total_centerness = divisors[1].clamp(min=1e-6)

        label = torch.where(positive, label, 0)
        focal = focal_loss(logits, label, positive, self.recipe.focal_alpha)
        loss_cls = focal.sum() / positives

        box_loss = giou_loss if self.recipe.box_loss == "giou" else iou_loss
        weighted = box_loss(distances, target_distances) * target_centerness
        loss_bbox = weighted.sum() / total_centerness

        entropy = F.binary_cross_entropy_with_logits(
            centerness.squeeze(-1), target_centerness, reduction="none"
        )
        loss_centerness = torch.where(positive, entropy, 0.0).sum() / positives
        return {
            "loss_cls": loss_cls,
            "loss_bbox": loss_bbox,
            "loss_centerness": loss_centerness,
            "loss": loss_cls + loss_bbox + loss_centerness,
        }

    @torch.no_grad()
    def targets(
        self, sizes: MapSizes, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each point should predict.

        The results are `positive` (N, P) bool, the class (N, P) int64, which is `num_classes` for
        background, and the distances (N, P, 4) in the unit of the outputs, which are meaningless
        where `positive` is false.
        """
        recipe = self.recipe
        device = boxes.device
        levels = make_levels(recipe, sizes, device)
        positive, matched, label = assign(levels, boxes, labels, valid, recipe.center_radius)
        label = torch.where(positive, label, self.num_classes)
        matched_boxes = boxes.gather(1, matched.unsqueeze(-1).expand(-1, -1, 4))
        distances = encode(matched_boxes, make_anchors(recipe, sizes, device))
        if recipe.norm_on_bbox:
            distances = distances / point_strides(recipe, sizes, device)
        return positive, label, distances


def focal_loss(logits: Tensor, label: Tensor, positive: Tensor, alpha: float) -> Tensor:
    """Return the focal loss (N, P, C) of logits (N, P, C), with gamma 2.

    The target is 1 for the class `label` (N, P) of a point where `positive` (N, P), and 0 for all
    other classes. Source: focal loss paper, equation 5.
    """
    is_target = torch.zeros_like(logits, dtype=torch.bool)
    is_target = is_target.scatter(2, label.unsqueeze(-1), positive.unsqueeze(-1))
    sign = torch.where(is_target, -1.0, 1.0)
    weight = torch.where(is_target, alpha, 1 - alpha)
    # The logit of the wrong answer: the higher it is, the worse is the prediction.
    wrong_logits = sign * logits
    wrong = wrong_logits.sigmoid()  # 1 - p_t in the paper
    entropy = -F.logsigmoid(-wrong_logits)  # -log p_t; softplus has no gradient on an NPU
    return weight * wrong.square() * entropy


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
    iou = overlap / union.clamp(min=1e-6)
    return -iou.clamp(min=1e-6).log()


def giou_loss(distances: Tensor, target: Tensor) -> Tensor:
    """Return 1 - GIoU (...) of two boxes around the same point, both (..., 4) distances.

    Source: GIoU paper, algorithm 1.
    """
    overlap = area(torch.minimum(distances, target))
    union = area(distances) + area(target) - overlap
    union = union.clamp(min=1e-7)
    enclosing = area(torch.maximum(distances, target)).clamp(min=1e-7)
    iou = overlap / union
    return 1 - iou + (enclosing - union) / enclosing


def area(distances: Tensor) -> Tensor:
    """Return the area (...) of the boxes that have these distances (..., 4) from a point."""
    left, top, right, bottom = distances.unbind(-1)
    return (left + right) * (top + bottom)
