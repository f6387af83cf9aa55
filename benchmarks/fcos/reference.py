"""What the original does, re-implemented from its description: the peer of the measurements.

Not the original's code, and no part of the product. The same algorithm and the same division of
work: OpenCV in the worker, float32 images normalised, padded and collated there; targets image by
image over (points, boxes); focal loss by a one-hot target; NMS of all pairs above the threshold.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import nms

from common.coco.index import CocoIndex
from fcos.anchors import decode, make_levels
from fcos.config import Recipe
from fcos.data import STRIDE, resized_size, scale_boxes
from fcos.model import Outputs

NONE = 1e8  # the area of a box that a point may not learn
SEVERAL_CALLS = 10_000  # candidates from which NMS runs class by class


class ReferenceSet(Dataset):
    """`dataset[record]`: image (3, H, W) float32, boxes (n, 4) in its pixels, labels (n,)."""

    def __init__(self, records: CocoIndex, truth, recipe: Recipe):
        """`truth(record)` gives boxes and labels."""
        self.records, self.truth, self.recipe = records, truth, recipe
        self.mean = np.float64((*recipe.mean, 0))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        image = cv2.imread(self.records.path(record))
        boxes, labels = self.truth(record)
        height, width = resized_size(*image.shape[:2], self.recipe.eval_scale)
        boxes = scale_boxes(boxes, image.shape[:2], (height, width))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        if np.random.random() < self.recipe.flip_probability:
            image = cv2.flip(image, 1)
            boxes = np.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1
            )
        image = image.astype(np.float32)
        cv2.subtract(image, self.mean, image)
        below, beside = -height % STRIDE, -width % STRIDE
        image = cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=0)
        chw = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(chw), torch.from_numpy(boxes), torch.from_numpy(labels)

    @staticmethod
    def collate(samples: list[tuple]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Images padded to the largest height and width of the batch."""
        images, boxes, labels = zip(*samples, strict=True)
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images]
        return torch.stack(padded), list(boxes), list(labels)


class ReferenceLoss:
    """The loss of raw outputs, without norm on boxes, IoU loss."""

    def __init__(self, recipe: Recipe, num_classes: int):
        self.recipe, self.background = recipe, num_classes

    def points(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Points (P, 2) and the bounds (P, 2) of their levels, made anew in every step."""
        points, bounds = [], []
        for level in make_levels.__wrapped__(self.recipe, outputs.sizes()):
            y, x = torch.meshgrid(level.y, level.x, indexing="ij")
            points.append(torch.stack([x.flatten(), y.flatten()], dim=-1))
            bounds.append(torch.tensor([level.low, level.high]).expand(y.numel(), 2))
        return torch.cat(points), torch.cat(bounds)

    def targets(self, points, bounds, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (P,) and distances (P, 4) of one image."""
        shape = (len(points), len(boxes))
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        areas = areas.unsqueeze(0).repeat(len(points), 1)
        bounds = bounds.unsqueeze(1).expand(*shape, 2)
        boxes = boxes.unsqueeze(0).expand(*shape, 4)
        x, y = (points[:, axis].unsqueeze(1).expand(shape) for axis in (0, 1))
        sides = (x - boxes[..., 0], y - boxes[..., 1], boxes[..., 2] - x, boxes[..., 3] - y)
        distances = torch.stack(sides, dim=-1)
        inside = distances.min(dim=-1).values > 0
        furthest = distances.max(dim=-1).values
        in_range = (furthest >= bounds[..., 0]) & (furthest <= bounds[..., 1])
        areas[~inside] = NONE
        areas[~in_range] = NONE
        smallest, chosen = areas.min(dim=1)
        label = labels[chosen]
        label[smallest == NONE] = self.background
        return label, distances[range(len(points)), chosen]

    def __call__(self, outputs: Outputs, boxes: list, labels: list) -> Tensor:
        points, bounds = self.points(outputs)
        truth = zip(boxes, labels, strict=True)
        label, target = zip(*(self.targets(points, bounds, *image) for image in truth), strict=True)
        label, target = torch.cat(label), torch.cat(target)
        logits, distances, centerness = (raw.flatten(0, 1) for raw in outputs.flat())
        positive = ((label >= 0) & (label < self.background)).nonzero().squeeze(1)
        count = max(float(len(positive)), 1.0)
        class_loss = self.focal(logits, label) / count

        point = points.repeat(len(boxes), 1)[positive]
        target = target[positive]
        across, down = target[:, [0, 2]], target[:, [1, 3]]
        ratio = across.min(dim=1).values / across.max(dim=1).values
        center = (ratio * (down.min(dim=1).values / down.max(dim=1).values)).sqrt()
        overlap = iou(decode(distances[positive], point), decode(target, point))
        box_loss = (-overlap.clamp(min=1e-6).log() * center).sum() / max(float(center.sum()), 1e-6)
        raw = centerness[positive].squeeze(1)
        return class_loss + box_loss + F.binary_cross_entropy_with_logits(raw, center)

    def focal(self, logits: Tensor, label: Tensor) -> Tensor:
        target = F.one_hot(label, self.background + 1)[:, : self.background].type_as(logits)
        chance, alpha = logits.sigmoid(), self.recipe.focal_alpha
        off = (1 - chance) * target + chance * (1 - target)
        weight = (alpha * target + (1 - alpha) * (1 - target)) * off.pow(2)
        return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).sum()


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU (n,) of pairs of boxes (n, 4)."""
    low, high = torch.max(boxes[:, :2], others[:, :2]), torch.min(boxes[:, 2:], others[:, 2:])
    sides = (high - low).clamp(min=0)
    shared = sides[:, 0] * sides[:, 1]
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)


def reference_detect(outputs: Outputs, size: tuple, factors: Tensor, recipe: Recipe) -> tuple:
    """Boxes, scores and labels of one image of `size` (height, width) in the input, best first;
    `factors` (4,) divide the boxes."""
    limit = torch.tensor([size[1], size[0]] * 2)
    boxes, scores, weights = [], [], []
    levels = make_levels(recipe, outputs.sizes())
    for level, logits, distances, centerness in zip(levels, *outputs, strict=True):
        y, x = torch.meshgrid(level.y, level.x, indexing="ij")
        points = torch.stack([x.flatten(), y.flatten()], dim=-1)
        score = logits[0].permute(1, 2, 0).flatten(0, 1).sigmoid()
        weight = centerness[0].permute(1, 2, 0).flatten().sigmoid()
        distance = distances[0].permute(1, 2, 0).flatten(0, 1)
        if len(score) > recipe.candidates:
            best = (score * weight.unsqueeze(1)).max(dim=1).values.topk(recipe.candidates).indices
            points, score, weight, distance = (a[best] for a in (points, score, weight, distance))
        boxes.append(torch.minimum(decode(distance, points).clamp(min=0), limit))
        scores.append(score)
        weights.append(weight)
    boxes, scores, weights = torch.cat(boxes) / factors, torch.cat(scores), torch.cat(weights)
    passed = scores > recipe.score_threshold
    labels = passed.nonzero()[:, 1]
    boxes = boxes.unsqueeze(1).expand(-1, scores.shape[1], 4)[passed]
    scores = (scores * weights.unsqueeze(1))[passed]
    shifted = boxes + (labels * (boxes.max() + 1)).unsqueeze(1)
    if len(boxes) < SEVERAL_CALLS:
        kept = nms(shifted, scores, recipe.nms_iou)
    else:
        survives = torch.zeros(len(boxes), dtype=torch.bool)
        for label in labels.unique():
            own = (labels == label).nonzero().squeeze(1)
            survives[own[nms(shifted[own], scores[own], recipe.nms_iou)]] = True
        kept = survives.nonzero().squeeze(1)
        kept = kept[scores[kept].argsort(descending=True)]
    kept = kept[: recipe.max_detections]
    return boxes[kept], scores[kept], labels[kept]
