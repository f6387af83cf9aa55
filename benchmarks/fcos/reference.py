"""What the original does, re-implemented from its description: the peer of the measurements.

This is not the original's code, and no part of the product. It has the same algorithms and the same
division of work: a worker runs OpenCV and normalises, pads and collates float32 images; targets are
computed image by image over (points, boxes); the focal loss has a one-hot target; NMS takes all
pairs of a point and a class above the threshold.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import nms

from common.arithmetic import round_up
from common.coco.index import CocoIndex
from fcos.anchors import Level, decode, make_levels
from fcos.config import Recipe
from fcos.data import CANVAS_MULTIPLE, flip_boxes, resized_size, scale_boxes
from fcos.model import Outputs

INFINITE_AREA = 1e8  # stands for the area of a box that a point may not learn
MAX_JOINT_NMS = 10_000  # candidates; from so many on, NMS runs class by class


class ReferenceSet(Dataset):
    """`dataset[record]` is an image (3, H, W) float32, boxes (n, 4) in its pixels, labels (n,)."""

    def __init__(self, records: CocoIndex, ground_truth: Callable, recipe: Recipe):
        """`ground_truth(record)` gives boxes and labels, as that of TrainingSet does."""
        self.records = records
        self.ground_truth = ground_truth
        self.recipe = recipe
        self.mean = np.float64([*recipe.mean, 0])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        image = cv2.imread(self.records.path(record))
        boxes, labels = self.ground_truth(record)
        old_height, old_width = image.shape[:2]
        height, width = resized_size(old_height, old_width, self.recipe.eval_scale)
        boxes = scale_boxes(boxes, (old_height, old_width), (height, width))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        if np.random.random() < self.recipe.flip_probability:
            image = cv2.flip(image, 1)
            boxes = flip_boxes(boxes, width)
        image = image.astype(np.float32)
        cv2.subtract(image, self.mean, image)
        below = round_up(height, CANVAS_MULTIPLE) - height
        beside = round_up(width, CANVAS_MULTIPLE) - width
        image = cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=0)
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(planes), torch.from_numpy(boxes), torch.from_numpy(labels)

    @staticmethod
    def collate(samples: list[tuple]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Pad the images to the largest height and the largest width of the batch."""
        height = max(image.shape[1] for image, _, _ in samples)
        width = max(image.shape[2] for image, _, _ in samples)
        images = []
        for image, _, _ in samples:
            below = height - image.shape[1]
            beside = width - image.shape[2]
            images.append(F.pad(image, (0, beside, 0, below)))
        boxes = [boxes for _, boxes, _ in samples]
        labels = [labels for _, _, labels in samples]
        return torch.stack(images), boxes, labels


def level_points(level: Level) -> Tensor:
    """Return the points (n, 2) of a level as (x, y)."""
    y, x = torch.meshgrid(level.y, level.x, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


class ReferenceLoss:
    """The loss of raw outputs for a recipe with distances in pixels and the IoU loss."""

    def __init__(self, recipe: Recipe, num_classes: int):
        self.recipe = recipe
        self.background = num_classes

    def points(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return points (P, 2) and the ranges (P, 2) of their levels, made anew in every step."""
        points = []
        ranges = []
        make_levels_anew = make_levels.__wrapped__
        for level in make_levels_anew(self.recipe, outputs.map_sizes()):
            of_level = level_points(level)
            points.append(of_level)
            level_range = torch.tensor([level.min_distance, level.max_distance])
            ranges.append(level_range.expand(len(of_level), 2))
        return torch.cat(points), torch.cat(ranges)

    def targets(
        self, points: Tensor, ranges: Tensor, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the labels (P,) and the distances (P, 4) of one image."""
        shape = (len(points), len(boxes))
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        areas = areas.unsqueeze(0).repeat(len(points), 1)
        ranges = ranges.unsqueeze(1).expand(*shape, 2)
        boxes = boxes.unsqueeze(0).expand(*shape, 4)
        x = points[:, 0].unsqueeze(1).expand(shape)
        y = points[:, 1].unsqueeze(1).expand(shape)
        left = x - boxes[..., 0]
        top = y - boxes[..., 1]
        right = boxes[..., 2] - x
        bottom = boxes[..., 3] - y
        distances = torch.stack([left, top, right, bottom], dim=-1)
        is_inside = distances.min(dim=-1).values > 0
        largest_distance = distances.max(dim=-1).values
        is_above_minimum = largest_distance >= ranges[..., 0]
        is_below_maximum = largest_distance <= ranges[..., 1]
        areas[~is_inside] = INFINITE_AREA
        areas[~(is_above_minimum & is_below_maximum)] = INFINITE_AREA
        smallest_area, matched = areas.min(dim=1)
        label = labels[matched]
        label[smallest_area == INFINITE_AREA] = self.background
        return label, distances[range(len(points)), matched]

    def __call__(self, outputs: Outputs, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
        points, ranges = self.points(outputs)
        label_list = []
        target_list = []
        for image_boxes, image_labels in zip(boxes, labels, strict=True):
            label, target = self.targets(points, ranges, image_boxes, image_labels)
            label_list.append(label)
            target_list.append(target)
        label = torch.cat(label_list)
        target = torch.cat(target_list)
        logits, distances, centerness = outputs.flat()
        logits = logits.flatten(0, 1)
        distances = distances.flatten(0, 1)
        centerness = centerness.flatten(0, 1)
        positive = ((label >= 0) & (label < self.background)).nonzero().squeeze(1)
        count = max(float(len(positive)), 1.0)
        loss_cls = self.focal(logits, label) / count

        distances = distances[positive]
        target = target[positive]
        centerness = centerness[positive, 0]
        points = points.repeat(len(boxes), 1)[positive]
        horizontal = target[:, [0, 2]]
        vertical = target[:, [1, 3]]
        across = horizontal.min(dim=1).values / horizontal.max(dim=1).values
        down = vertical.min(dim=1).values / vertical.max(dim=1).values
        target_centerness = torch.sqrt(across * down)
        total_centerness = max(target_centerness.sum().item(), 1e-6)
        overlap = iou(decode(distances, points), decode(target, points))
        box_losses = -overlap.clamp(min=1e-6).log()
        loss_bbox = (box_losses * target_centerness).sum() / total_centerness
        loss_centerness = F.binary_cross_entropy_with_logits(centerness, target_centerness)
        return loss_cls + loss_bbox + loss_centerness

    def focal(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the focal loss of all points, summed."""
        one_hot = F.one_hot(label, self.background + 1)
        target = one_hot[:, : self.background].type_as(logits)
        probability = logits.sigmoid()
        alpha = self.recipe.focal_alpha
        wrong = (1 - probability) * target + probability * (1 - target)
        weight = (alpha * target + (1 - alpha) * (1 - target)) * wrong.pow(2)
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (entropy * weight).sum()


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU (n,) of pairs of boxes (n, 4) xyxy."""
    top_left = torch.max(boxes[:, :2], others[:, :2])
    bottom_right = torch.min(boxes[:, 2:], others[:, 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    other_areas = (others[:, 2:] - others[:, :2]).prod(dim=1)
    return overlap / (areas + other_areas - overlap).clamp(min=1e-6)


def reference_detect(
    outputs: Outputs, size: tuple[int, int], factors: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, scores and labels of one image, best first.

    `size` is the (height, width) of the image in the network input; `factors` (4,) divide the
    boxes.
    """
    height, width = size
    limit = torch.tensor([width, height, width, height])
    box_list = []
    probability_list = []
    centerness_list = []
    for i, level in enumerate(make_levels(recipe, outputs.map_sizes())):
        points = level_points(level)
        probability = outputs.logits[i][0].permute(1, 2, 0).flatten(0, 1).sigmoid()
        centerness = outputs.centerness[i][0].permute(1, 2, 0).flatten().sigmoid()
        distances = outputs.distances[i][0].permute(1, 2, 0).flatten(0, 1)
        if len(probability) > recipe.candidates:
            score = (probability * centerness.unsqueeze(1)).max(dim=1).values
            best = score.topk(recipe.candidates).indices
            points = points[best]
            probability = probability[best]
            centerness = centerness[best]
            distances = distances[best]
        box_list.append(torch.minimum(decode(distances, points).clamp(min=0), limit))
        probability_list.append(probability)
        centerness_list.append(centerness)
    boxes = torch.cat(box_list) / factors
    probability = torch.cat(probability_list)
    centerness = torch.cat(centerness_list)

    passed = probability > recipe.score_threshold
    labels = passed.nonzero()[:, 1]
    boxes = boxes.unsqueeze(1).expand(-1, probability.shape[1], 4)[passed]
    scores = (probability * centerness.unsqueeze(1))[passed]
    kept = reference_nms(boxes, scores, labels, recipe.nms_iou)[: recipe.max_detections]
    return boxes[kept], scores[kept], labels[kept]


def reference_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes that survive NMS by class, best first."""
    # Boxes of different classes are moved so far apart that they do not overlap.
    shifted = boxes + (labels * (boxes.max() + 1)).unsqueeze(1)
    if len(boxes) < MAX_JOINT_NMS:
        return nms(shifted, scores, iou_threshold)
    survives = torch.zeros(len(boxes), dtype=torch.bool)
    for label in labels.unique():
        of_class = (labels == label).nonzero().squeeze(1)
        survives[of_class[nms(shifted[of_class], scores[of_class], iou_threshold)]] = True
    kept = survives.nonzero().squeeze(1)
    return kept[scores[kept].argsort(descending=True)]
