"""What the original does, re-implemented from its description: the peer of the measurements.

Not the original's code, and no part of the product. The same algorithm and the same division of
work: OpenCV on float32 images in the worker, a canvas filled for every expansion; matching and
loss image by image with indices of positives; NMS of all pairs above the threshold.
"""

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

SEVERAL_CALLS = 10_000  # candidates from which NMS runs class by class


class ReferenceSet(Dataset):
    """`dataset[record]`: image (3, S, S) float32, boxes (n, 4) in its pixels, labels (n,)."""

    def __init__(self, records: CocoIndex, truth, recipe: Recipe):
        """`truth(record)` gives boxes, labels and crowd boxes."""
        self.records, self.truth, self.recipe = records, truth, recipe
        self.mean = np.array(recipe.mean[::-1], np.float32)  # BGR

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        size = self.recipe.image_size
        image = cv2.imread(self.records.path(record)).astype(np.float32)
        boxes, labels, crowds = self.truth(record)
        image = self.colour(image)
        image, shift = self.expand(image)
        image, boxes, labels = self.crop(image, boxes + shift, labels, crowds + shift)
        height, width = image.shape[:2]
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        boxes = (boxes * np.float32([size / width, size / height] * 2)).clip(0, size)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        cv2.subtract(image, np.float64((*self.recipe.mean, 0)), image)
        if np.random.random() < self.recipe.flip_probability:
            image = cv2.flip(image, 1)
            boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
        chw = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(chw), torch.from_numpy(boxes), torch.from_numpy(labels)

    def colour(self, image: np.ndarray) -> np.ndarray:
        recipe, draw = self.recipe, np.random
        if draw.randint(2):
            image += draw.uniform(-recipe.brightness, recipe.brightness)
        contrast_first = draw.randint(2)
        if contrast_first and draw.randint(2):
            image *= draw.uniform(*recipe.contrast)
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        if draw.randint(2):
            hsv[..., 1] *= draw.uniform(*recipe.saturation)
        if draw.randint(2):
            hsv[..., 0] += draw.uniform(-recipe.hue, recipe.hue)
            hsv[..., 0][hsv[..., 0] > 360] -= 360
            hsv[..., 0][hsv[..., 0] < 0] += 360
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if not contrast_first and draw.randint(2):
            image *= draw.uniform(*recipe.contrast)
        return image[..., draw.permutation(3)] if draw.randint(2) else image

    def expand(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if np.random.uniform(0, 1) > self.recipe.expand_probability:
            return image, np.zeros(4, np.float32)
        height, width = image.shape[:2]
        ratio = np.random.uniform(*self.recipe.expand_ratio)
        canvas = np.empty((int(height * ratio), int(width * ratio), 3), np.float32)
        canvas[:] = self.mean
        left = int(np.random.uniform(0, width * ratio - width))
        top = int(np.random.uniform(0, height * ratio - height))
        canvas[top : top + height, left : left + width] = image
        return canvas, np.float32([left, top, left, top])

    def crop(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, crowds: np.ndarray):
        recipe, draw = self.recipe, np.random
        height, width = image.shape[:2]
        everything = np.concatenate([crowds, boxes])
        while True:
            limit = draw.choice(recipe.crop_ious)
            if limit == 1:
                return image, boxes, labels
            for _ in range(recipe.crop_trials):
                w = draw.uniform(recipe.crop_scale * width, width)
                h = draw.uniform(recipe.crop_scale * height, height)
                if not recipe.crop_ratio[0] <= h / w <= recipe.crop_ratio[1]:
                    continue
                left, top = draw.uniform(width - w), draw.uniform(height - h)
                x1, y1, x2, y2 = map(int, (left, top, left + w, top + h))
                if x1 == x2 or y1 == y2 or self.overlap((x1, y1, x2, y2), everything) < limit:
                    continue
                if len(everything) and not inside((x1, y1, x2, y2), everything).any():
                    continue
                kept = inside((x1, y1, x2, y2), boxes)
                corner, end = np.float32([x1, y1] * 2), np.float32([x2, y2] * 2)
                return image[y1:y2, x1:x2], boxes[kept].clip(corner, end) - corner, labels[kept]

    @staticmethod
    def overlap(patch: tuple, boxes: np.ndarray) -> float:
        """The smallest IoU of boxes with the patch."""
        patch = np.float32([patch])
        start = np.maximum(boxes[:, :2], patch[:, :2])
        sides = np.maximum(np.minimum(boxes[:, 2:], patch[:, 2:]) - start, 0)
        shared = sides[:, 0] * sides[:, 1]
        area, own = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (boxes, patch))
        return (shared / np.maximum(area + own - shared, 1e-6)).min(initial=1)


def inside(patch: tuple, boxes: np.ndarray) -> np.ndarray:
    """Whether the centres of boxes lie strictly inside the patch."""
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((center > patch[:2]) & (center < patch[2:])).all(axis=1)


class ReferenceLoss:
    """Class and box loss of a batch, the sum of what each image contributes."""

    def __init__(self, recipe: Recipe, num_classes: int):
        self.recipe, self.background = recipe, num_classes
        self.anchors = make_anchors(recipe)

    def assign(self, boxes: Tensor) -> Tensor:
        """Each anchor's ground truth, counted from 1; 0 for background."""
        overlap = box_iou(boxes, self.anchors)
        best, matched = overlap.max(dim=0)
        assigned = torch.full_like(matched, -1)
        assigned[(best >= 0) & (best < self.recipe.match_iou)] = 0
        positive = best >= self.recipe.match_iou
        assigned[positive] = matched[positive] + 1
        of_box, anchor = overlap.max(dim=1)
        for number in range(len(boxes)):
            if of_box[number] >= 0:
                assigned[anchor[number]] = number + 1
        return assigned

    def targets(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (P,), offsets (P, 4) and their weights (P, 4) of one image."""
        assigned = self.assign(boxes)
        positive = (assigned > 0).nonzero().squeeze(1).unique()
        owner = assigned[positive] - 1
        label = torch.full_like(assigned, self.background)
        label[positive] = labels[owner]
        target, weight = torch.zeros(2, len(self.anchors), 4)
        target[positive] = encode(boxes[owner], self.anchors[positive], self.recipe)
        weight[positive] = 1
        return label, target, weight

    def __call__(self, outputs: tuple[Tensor, Tensor], boxes: list, labels: list) -> Tensor:
        assert all(torch.isfinite(output).all() for output in outputs)
        self.anchors = make_anchors(self.recipe)  # anew in every step
        parts = [self.targets(*truth) for truth in zip(boxes, labels, strict=True)]
        count = sum(max(1, int((label != self.background).sum())) for label, _, _ in parts)
        pairs = zip(*outputs, parts, strict=True)
        return sum(self.single(*raw, *part, count) for *raw, part in pairs)

    def single(self, offsets, logits, label, target, weight, count: int) -> Tensor:
        entropy = F.cross_entropy(logits, label, reduction="none")
        positive = (label != self.background).nonzero().squeeze(1)
        negative = (label == self.background).nonzero().squeeze(1)
        hardest = min(len(negative), self.recipe.negative_ratio * len(positive))
        class_loss = entropy[positive].sum() + entropy[negative].topk(hardest).values.sum()
        box_loss = (weight * F.smooth_l1_loss(offsets, target, reduction="none")).sum()
        return (class_loss + box_loss) / count


def reference_detect(outputs: tuple[Tensor, Tensor], scale: Tensor, recipe: Recipe) -> tuple:
    """Boxes, scores and labels of one image, best first; `scale` (4,) divides the boxes."""
    offsets, logits = (output[0] for output in outputs)
    scores = logits.softmax(dim=1)[:, :-1]
    boxes = decode(offsets, make_anchors(recipe), recipe) / scale
    passed = scores > recipe.score_threshold
    labels = passed.nonzero()[:, 1]
    boxes = boxes.unsqueeze(1).expand(-1, scores.shape[1], 4)[passed]
    scores = scores[passed]
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
