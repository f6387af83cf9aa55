"""What the original does, re-implemented from its description: the peer of the measurements.

It is not the original's code and no part of the product. The algorithm and the division of work are
the same: OpenCV on float32 images in the worker, a canvas filled for every expansion; matching and
loss image by image with indices of positives; NMS of all pairs above the threshold.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_iou, nms

from common.coco.index import CocoIndex
from ssd_mmdet.anchors import decode, encode, make_anchors
from ssd_mmdet.config import Recipe

MAX_JOINT_NMS = 10_000  # candidates; from so many on, NMS runs class by class


class ReferenceSet(Dataset):
    """`dataset[record]`: image (3, S, S) float32, boxes (n, 4) in its pixels, labels (n,)."""

    def __init__(self, records: CocoIndex, ground_truth: Callable, recipe: Recipe):
        """`ground_truth(record)` returns boxes, labels and crowd boxes."""
        self.records = records
        self.ground_truth = ground_truth
        self.recipe = recipe
        self.mean_bgr = np.array(recipe.mean[::-1], np.float32)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        size = self.recipe.image_size
        image = cv2.imread(self.records.path(record)).astype(np.float32)
        boxes, labels, crowd_boxes = self.ground_truth(record)
        image = self.jitter_colours(image)
        image, shift = self.expand(image)
        image, boxes, labels = self.crop(image, boxes + shift, labels, crowd_boxes + shift)

        height, width = image.shape[:2]
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        scale = np.float32([size / width, size / height, size / width, size / height])
        boxes = (boxes * scale).clip(0, size)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        cv2.subtract(image, np.float64((*self.recipe.mean, 0)), image)
        if np.random.random() < self.recipe.flip_probability:
            image = cv2.flip(image, 1)
            left, top, right, bottom = boxes.T
            boxes = np.stack([size - right, top, size - left, bottom], axis=1)
        channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(channels_first), torch.from_numpy(boxes), torch.from_numpy(labels)

    def jitter_colours(self, image: np.ndarray) -> np.ndarray:
        recipe = self.recipe
        rng = np.random
        if rng.randint(2):
            image += rng.uniform(-recipe.brightness, recipe.brightness)
        contrast_first = rng.randint(2)
        if contrast_first and rng.randint(2):
            image *= rng.uniform(*recipe.contrast)
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        if rng.randint(2):
            hsv[..., 1] *= rng.uniform(*recipe.saturation)
        if rng.randint(2):
            hue = hsv[..., 0]  # a view: changes go into `hsv`
            hue += rng.uniform(-recipe.hue, recipe.hue)
            hue[hue > 360] -= 360
            hue[hue < 0] += 360
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if not contrast_first and rng.randint(2):
            image *= rng.uniform(*recipe.contrast)
        if rng.randint(2):
            image = image[..., rng.permutation(3)]
        return image

    def expand(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the image on a larger canvas, or as it is, and the shift (4,) of its boxes."""
        if np.random.uniform(0, 1) > self.recipe.expand_probability:
            return image, np.zeros(4, np.float32)
        height, width = image.shape[:2]
        ratio = np.random.uniform(*self.recipe.expand_ratio)
        canvas = np.empty((int(height * ratio), int(width * ratio), 3), np.float32)
        canvas[:] = self.mean_bgr
        left = int(np.random.uniform(0, width * ratio - width))
        top = int(np.random.uniform(0, height * ratio - height))
        canvas[top : top + height, left : left + width] = image
        return canvas, np.float32([left, top, left, top])

    def crop(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, crowd_boxes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        recipe = self.recipe
        rng = np.random
        height, width = image.shape[:2]
        all_boxes = np.concatenate([crowd_boxes, boxes])
        while True:
            min_iou = rng.choice(recipe.crop_ious)
            if min_iou == 1:
                return image, boxes, labels
            for _ in range(recipe.crop_trials):
                crop_width = rng.uniform(recipe.crop_scale * width, width)
                crop_height = rng.uniform(recipe.crop_scale * height, height)
                lowest, highest = recipe.crop_ratio
                if not lowest <= crop_height / crop_width <= highest:
                    continue
                left = rng.uniform(width - crop_width)
                top = rng.uniform(height - crop_height)
                x1 = int(left)
                y1 = int(top)
                x2 = int(left + crop_width)
                y2 = int(top + crop_height)
                window = (x1, y1, x2, y2)
                if x1 == x2 or y1 == y2 or smallest_iou(window, all_boxes) < min_iou:
                    continue
                if len(all_boxes) and not has_centers_of(window, all_boxes).any():
                    continue
                kept = has_centers_of(window, boxes)
                top_left = np.float32([x1, y1, x1, y1])
                bottom_right = np.float32([x2, y2, x2, y2])
                cropped_boxes = boxes[kept].clip(top_left, bottom_right) - top_left
                return image[y1:y2, x1:x2], cropped_boxes, labels[kept]


def smallest_iou(window: tuple[int, int, int, int], boxes: np.ndarray) -> float:
    """Return the smallest IoU of boxes (n, 4) with the window."""
    window_boxes = np.float32([window])
    top_left = np.maximum(boxes[:, :2], window_boxes[:, :2])
    bottom_right = np.minimum(boxes[:, 2:], window_boxes[:, 2:])
    sides = np.maximum(bottom_right - top_left, 0)
    overlap = sides[:, 0] * sides[:, 1]
    union = box_areas(boxes) + box_areas(window_boxes) - overlap
    return (overlap / np.maximum(union, 1e-6)).min(initial=1)


def box_areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def has_centers_of(window: tuple[int, int, int, int], boxes: np.ndarray) -> np.ndarray:
    """Return whether the centres of boxes (n, 4) lie strictly inside the window."""
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((center > window[:2]) & (center < window[2:])).all(axis=1)


class ReferenceLoss:
    """Class and box loss of a batch, the sum of what each image contributes."""

    def __init__(self, recipe: Recipe, num_classes: int):
        self.recipe = recipe
        self.background = num_classes
        self.anchors = make_anchors(recipe)

    def assign(self, boxes: Tensor) -> Tensor:
        """Return each anchor's ground truth, counted from 1; 0 stands for background."""
        overlap = box_iou(boxes, self.anchors)
        best_overlap, best_box = overlap.max(dim=0)
        assigned = torch.full_like(best_box, -1)
        assigned[(best_overlap >= 0) & (best_overlap < self.recipe.match_iou)] = 0
        positive = best_overlap >= self.recipe.match_iou
        assigned[positive] = best_box[positive] + 1
        overlap_of_box, best_anchor = overlap.max(dim=1)
        for number in range(len(boxes)):
            if overlap_of_box[number] >= 0:
                assigned[best_anchor[number]] = number + 1
        return assigned

    def targets(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels (P,), deltas (P, 4) and the weights (P, 4) of the deltas of one image."""
        assigned = self.assign(boxes)
        positive = (assigned > 0).nonzero().squeeze(1).unique()
        box = assigned[positive] - 1
        label = torch.full_like(assigned, self.background)
        label[positive] = labels[box]
        deltas = torch.zeros(len(self.anchors), 4)
        deltas[positive] = encode(boxes[box], self.anchors[positive], self.recipe)
        weights = torch.zeros(len(self.anchors), 4)
        weights[positive] = 1
        return label, deltas, weights

    def __call__(
        self, outputs: tuple[Tensor, Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> Tensor:
        assert all(torch.isfinite(output).all() for output in outputs)
        self.anchors = make_anchors(self.recipe)  # the original makes them anew in every step
        targets = []
        count = 0
        for image_boxes, image_labels in zip(boxes, labels, strict=True):
            image_targets = self.targets(image_boxes, image_labels)
            targets.append(image_targets)
            positives = (image_targets[0] != self.background).sum()
            count += max(1, int(positives))
        total = 0
        for deltas, logits, image_targets in zip(*outputs, targets, strict=True):
            total = total + self.image_loss(deltas, logits, image_targets, count)
        return total

    def image_loss(
        self, deltas: Tensor, logits: Tensor, targets: tuple[Tensor, Tensor, Tensor], count: int
    ) -> Tensor:
        label, target_deltas, weights = targets
        entropy = F.cross_entropy(logits, label, reduction="none")
        positive = (label != self.background).nonzero().squeeze(1)
        negative = (label == self.background).nonzero().squeeze(1)
        hardest = min(len(negative), self.recipe.negative_ratio * len(positive))
        class_loss = entropy[positive].sum() + entropy[negative].topk(hardest).values.sum()
        box_loss = (weights * F.smooth_l1_loss(deltas, target_deltas, reduction="none")).sum()
        return (class_loss + box_loss) / count


def reference_detect(
    outputs: tuple[Tensor, Tensor], scale: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, scores and labels of one image, best first; `scale` (4,) divides the boxes."""
    deltas = outputs[0][0]
    logits = outputs[1][0]
    scores = logits.softmax(dim=1)[:, :-1]
    boxes = decode(deltas, make_anchors(recipe), recipe) / scale
    passed = scores > recipe.score_threshold
    labels = passed.nonzero()[:, 1]
    boxes = boxes.unsqueeze(1).expand(-1, scores.shape[1], 4)[passed]
    scores = scores[passed]
    kept = reference_nms(boxes, scores, labels, recipe.nms_iou)[: recipe.max_detections]
    return boxes[kept], scores[kept], labels[kept]


def reference_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes (n, 4) that survive the NMS of their class, best first."""
    # Each class is shifted to an area where no other class has boxes.
    shifted = boxes + (labels * (boxes.max() + 1)).unsqueeze(1)
    if len(boxes) < MAX_JOINT_NMS:
        return nms(shifted, scores, iou_threshold)
    survives = torch.zeros(len(boxes), dtype=torch.bool)
    for label in labels.unique():
        of_class = (labels == label).nonzero().squeeze(1)
        survivors = nms(shifted[of_class], scores[of_class], iou_threshold)
        survives[of_class[survivors]] = True
    kept = survives.nonzero().squeeze(1)
    return kept[scores[kept].argsort(descending=True)]
