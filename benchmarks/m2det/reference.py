"""What the original does, re-implemented from its description: the peer of the measurements.

This is not the original's code, and no part of the product. It has the same algorithms and the same
division of work: a worker runs OpenCV and fills a canvas for every expansion; matching goes image
by image, and the loss gathers its rows by masks; soft-NMS is compiled code (soft_nms.c, built by
the system's `cc`), class by class; the leach module is computed for each level.
"""

import ctypes
import functools
import random
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from common.coco.detections import Detections
from common.coco.index import CocoIndex
from common.errors import UserError
from m2det.anchors import decode, make_anchors, to_cxcywh, to_xyxy
from m2det.config import Recipe
from m2det.model import M2Det

INTERPOLATIONS = {
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST,
    "lanczos": cv2.INTER_LANCZOS4,
}
CLAIMED_IOU = 2.0  # stands for the IoU of an anchor that a ground truth claims: above all others

# Returns the boxes of a record, in pixels, and their labels.
GroundTruth = Callable[[int], tuple[np.ndarray, np.ndarray]]


class ReferenceSet(Dataset):
    """`dataset[record]`: image (3, S, S) float32, boxes (n, 4) normalised xyxy, labels (n,)."""

    def __init__(self, records: CocoIndex, ground_truth: GroundTruth, recipe: Recipe):
        self.records = records
        self.ground_truth = ground_truth
        self.recipe = recipe

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        original = cv2.imread(self.records.path(record))
        all_boxes, all_labels = self.ground_truth(record)
        if len(all_boxes):
            image, boxes, labels = self.crop(original, all_boxes, all_labels)
            image = self.jitter_colours(image)
            image, boxes = self.expand(image, boxes)
            if random.randrange(2):
                image = image[:, ::-1]
                boxes = flip_boxes(boxes, image.shape[1])
            resized = self.resize(image)
            boxes = normalise_boxes(boxes, image)
            is_large_enough = (boxes[:, 2:] - boxes[:, :2] > self.recipe.min_box).all(axis=1)
            if is_large_enough.any():
                return resized, boxes[is_large_enough], labels[is_large_enough]
        return self.resize(original), normalise_boxes(all_boxes, original), all_labels

    def resize(self, image: np.ndarray) -> Tensor:
        """Resize by a random method, and subtract the mean."""
        size = self.recipe.image_size
        interpolation = INTERPOLATIONS[random.choice(self.recipe.interpolations)]
        image = cv2.resize(image, (size, size), interpolation=interpolation)
        image = image.astype(np.float32)
        image -= self.recipe.mean
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def crop(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut a random window out of an image; boxes whose centre lies outside are left out."""
        while True:
            min_iou = random.choice(self.recipe.crop_ious)
            if min_iou is None:
                return image, boxes, labels
            for _ in range(self.recipe.crop_trials):
                window = self.random_window(*image.shape[:2])
                if iou_with_window(boxes, window).min() < min_iou:
                    continue
                center = (boxes[:, :2] + boxes[:, 2:]) / 2
                is_inside = ((window[:2] < center) & (center < window[2:])).all(axis=1)
                if not is_inside.any():
                    continue
                left, top, right, bottom = window
                corner = np.array([left, top, left, top])
                boxes = boxes[is_inside].clip(corner, (right, bottom, right, bottom)) - corner
                return image[top:bottom, left:right], boxes, labels[is_inside]

    def random_window(self, height: int, width: int) -> np.ndarray:
        """Draw a window (4,) xyxy of an image of this size."""
        scale = random.uniform(*self.recipe.crop_scale)
        lowest_ratio = max(self.recipe.crop_ratio[0], scale**2)
        highest_ratio = min(self.recipe.crop_ratio[1], scale**-2)
        stretch = random.uniform(lowest_ratio, highest_ratio) ** 0.5
        window_width = int(scale * stretch * width)
        window_height = int(scale / stretch * height)
        left = random.randrange(max(width - window_width, 1))
        top = random.randrange(max(height - window_height, 1))
        return np.array([left, top, left + window_width, top + window_height])

    def jitter_colours(self, image: np.ndarray) -> np.ndarray:
        """Change an image (H, W, 3) uint8 BGR, each of four ways with probability 1/2."""
        recipe = self.recipe
        image = image.copy()
        if random.randrange(2):
            added = random.uniform(-recipe.brightness, recipe.brightness)
            image = to_uint8(image.astype(float) + added)
        if random.randrange(2):
            image = to_uint8(image * random.uniform(*recipe.contrast))
        image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        if random.randrange(2):
            hue = image[..., 0].astype(int) + random.randint(-recipe.hue, recipe.hue)
            image[..., 0] = hue % 180
        if random.randrange(2):
            image[..., 1] = to_uint8(image[..., 1] * random.uniform(*recipe.saturation))
        return cv2.cvtColor(image, cv2.COLOR_HSV2BGR)

    def expand(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put an image on a larger canvas of the mean colour, with a probability."""
        recipe = self.recipe
        height, width = image.shape[:2]
        if random.random() > recipe.expand_probability:
            return image, boxes
        while True:
            scale = random.uniform(*recipe.expand_scale)
            lowest_ratio = max(recipe.expand_ratio[0], scale**-2)
            highest_ratio = min(recipe.expand_ratio[1], scale**2)
            stretch = random.uniform(lowest_ratio, highest_ratio) ** 0.5
            if scale * stretch >= 1 and scale / stretch >= 1:
                break
        canvas_width = int(scale * stretch * width)
        canvas_height = int(scale / stretch * height)
        left = random.randint(0, canvas_width - width)
        top = random.randint(0, canvas_height - height)
        canvas = np.empty((canvas_height, canvas_width, 3), np.uint8)
        canvas[:] = recipe.mean
        canvas[top : top + height, left : left + width] = image
        return canvas, boxes + np.array([left, top, left, top])


def to_uint8(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def normalise_boxes(boxes: np.ndarray, image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return boxes / [width, height, width, height]


def flip_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    left, top, right, bottom = boxes.T
    return np.stack([width - right, top, width - left, bottom], axis=1)


def iou_with_window(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return the IoU (n,) of boxes (n, 4) with a window (4,)."""
    top_left = np.maximum(boxes[:, :2], window[:2])
    bottom_right = np.minimum(boxes[:, 2:], window[2:])
    has_overlap = (top_left < bottom_right).all(axis=1)
    overlap = np.prod(bottom_right - top_left, axis=1) * has_overlap
    box_areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    window_area = np.prod(window[2:] - window[:2])
    return overlap / (box_areas + window_area - overlap)


class ReferenceLoss:
    """Multibox loss of raw outputs: location and class."""

    def __init__(self, recipe: Recipe, num_classes: int):
        self.recipe = recipe
        self.channels = num_classes + 1
        self.anchors = make_anchors(recipe)

    def match(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the deltas (P, 4) and channels (P,) of one image; labels count from 1."""
        iou = self.pairwise_iou(boxes)
        best_anchor = iou.max(dim=1).indices
        best_iou, matched = iou.max(dim=0)
        best_iou.index_fill_(0, best_anchor, CLAIMED_IOU)
        for column in range(len(boxes)):
            matched[best_anchor[column]] = column
        channel = labels[matched]
        channel[best_iou < self.recipe.match_iou] = 0
        target = to_cxcywh(boxes[matched])
        center = self.anchors[:, :2]
        size = self.anchors[:, 2:]
        center_delta = (target[:, :2] - center) / (self.recipe.center_variance * size)
        size_delta = (target[:, 2:] / size).log() / self.recipe.size_variance
        return torch.cat([center_delta, size_delta], dim=1), channel

    def pairwise_iou(self, boxes: Tensor) -> Tensor:
        """Return the IoU (M, P) of boxes (M, 4) with the anchors."""
        anchors = to_xyxy(self.anchors)
        shape = (len(boxes), len(anchors), 2)
        top_left = torch.max(
            boxes[:, None, :2].expand(shape),
            anchors[None, :, :2].expand(shape),
        )
        bottom_right = torch.min(
            boxes[:, None, 2:].expand(shape),
            anchors[None, :, 2:].expand(shape),
        )
        sides = (bottom_right - top_left).clamp(min=0)
        overlap = sides[..., 0] * sides[..., 1]
        box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        anchor_areas = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
        box_areas = box_areas.unsqueeze(1).expand_as(overlap)
        return overlap / (box_areas + anchor_areas.expand_as(overlap) - overlap)

    def __call__(self, outputs: tuple[Tensor, Tensor], boxes: list, labels: list) -> Tensor:
        deltas, logits = outputs
        targets = []
        channels = []
        for image_boxes, image_labels in zip(boxes, labels, strict=True):
            image_targets, image_channels = self.match(image_boxes, image_labels)
            targets.append(image_targets)
            channels.append(image_channels)
        target = torch.stack(targets)
        channel = torch.stack(channels)
        positive = channel > 0
        mask = positive.unsqueeze(2).expand_as(deltas)
        box_loss = F.smooth_l1_loss(deltas[mask], target[mask], reduction="sum")

        rows = logits.reshape(-1, self.channels)
        highest = rows.detach().max()
        log_sum = (rows - highest).exp().sum(dim=1, keepdim=True).log() + highest
        mining_loss = log_sum - rows.gather(1, channel.view(-1, 1))
        mining_loss[positive.view(-1, 1)] = 0
        order = mining_loss.view(len(boxes), -1).sort(dim=1, descending=True).indices
        rank = order.sort(dim=1).indices
        positives = positive.long().sum(dim=1, keepdim=True)
        hardest = (self.recipe.negative_ratio * positives).clamp(max=positive.shape[1] - 1)
        chosen = positive | (rank < hardest)
        chosen_logits = logits[chosen.unsqueeze(2).expand_as(logits)].view(-1, self.channels)
        class_loss = F.cross_entropy(chosen_logits, channel[chosen], reduction="sum")
        return (box_loss + class_loss) / positives.sum().clamp(min=1)


@functools.cache
def compiled_soft_nms():
    """Return the function `soft_nms` of soft_nms.c; raise UserError where there is no compiler."""
    source = Path(__file__).with_name("soft_nms.c")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/soft_nms.so"
        try:
            subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", library, source], check=True)
        except FileNotFoundError:
            raise UserError("cc: not found; the peer's soft-NMS needs a C compiler") from None
        function = ctypes.CDLL(library).soft_nms
    rows = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    function.argtypes = (rows, ctypes.c_int, ctypes.c_float, ctypes.c_float)
    return function


def reference_detect(
    outputs: tuple[Tensor, Tensor], size: tuple[int, int], recipe: Recipe
) -> Detections:
    """Return the detections of one image of `size` (height, width), by class and not clipped."""
    deltas, logits = outputs
    height, width = size
    soft_nms = compiled_soft_nms()
    boxes = to_xyxy(decode(deltas[0], make_anchors(recipe), recipe)).numpy()
    boxes = boxes * np.array([width, height, width, height], np.float32)
    scores = logits[0].softmax(dim=1).numpy()
    kept = []
    labels = []
    for channel in range(1, scores.shape[1]):
        passed = np.where(scores[:, channel] > recipe.score_threshold)[0]
        if not len(passed):
            continue
        rows = np.hstack([boxes[passed], scores[passed, channel, None]])
        remaining = soft_nms(rows, len(rows), recipe.soft_nms_iou, recipe.soft_nms_min_score)
        best = rows[: min(remaining, recipe.max_per_class)]
        kept.append(best)
        labels += [channel - 1] * len(best)
    rows = torch.from_numpy(np.concatenate(kept))
    return Detections(rows[:, :4], rows[:, 4], torch.tensor(labels))


class ReferenceM2Det(M2Det):
    """The network with the leach module computed for every level."""

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__(recipe, num_classes)
        self.leach[0].bn.momentum = 0.01

    def pyramid(self, base: Tensor) -> list[Tensor]:
        levels = []
        for level in range(1, self.num_levels + 1):
            tum_input = self.leach[level - 1](base)
            if levels:
                largest = levels[-1][-1]
                tum_input = torch.cat([tum_input, largest], dim=1)
            tum = getattr(self, f"unet{level}")
            levels.append(tum(tum_input))
        maps = [torch.cat(of_scale, dim=1) for of_scale in zip(*levels, strict=True)]
        maps.reverse()
        maps[0] = self.Norm(maps[0])
        return maps
