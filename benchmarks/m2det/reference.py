"""What the original does, re-implemented from its description: the peer of the measurements.

Not the original's code, and no part of the product. The same algorithm and the same division of
work: OpenCV in the worker, a canvas filled for every expansion; matching image by image, a loss
that gathers its rows by masks; soft-NMS in compiled code (soft_nms.c, built by the system's `cc`),
class by class; the leach module once for each level.
"""

import ctypes
import functools
import random
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from common.coco.index import CocoIndex
from common.errors import UserError
from m2det.anchors import decode, make_anchors, to_cxcywh, to_ltrb
from m2det.config import Recipe
from m2det.model import M2Det

INTERPOLATIONS = {
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST,
    "lanczos": cv2.INTER_LANCZOS4,
}


class ReferenceSet(Dataset):
    """`dataset[record]`: image (3, S, S) float32, boxes (n, 4) normalised ltrb, labels (n,)."""

    def __init__(self, records: CocoIndex, truth, recipe: Recipe):
        """`truth(record)` gives boxes in pixels and labels."""
        self.records, self.truth, self.recipe = records, truth, recipe

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        whole = cv2.imread(self.records.path(record))
        boxes, labels = self.truth(record)
        before = self.normalised(boxes, whole), labels
        if not len(boxes):
            return self.resize(whole), *before
        image, boxes, labels = self.crop(whole, boxes, labels)
        image = self.colour(image)
        image, boxes = self.expand(image, boxes)
        if random.randrange(2):
            image = image[:, ::-1]
            boxes = boxes.copy()
            boxes[:, 0::2] = image.shape[1] - boxes[:, 2::-2]
        made, boxes = self.resize(image), self.normalised(boxes, image)
        large = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) > self.recipe.min_box
        if not large.any():
            return self.resize(whole), *before
        return made, boxes[large], labels[large]

    @staticmethod
    def normalised(boxes: np.ndarray, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        return boxes / [width, height, width, height]

    def resize(self, image: np.ndarray) -> Tensor:
        size = self.recipe.image_size
        method = INTERPOLATIONS[random.choice(self.recipe.interpolations)]
        image = cv2.resize(image, (size, size), interpolation=method).astype(np.float32)
        image -= self.recipe.mean
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def crop(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray):
        recipe, (height, width) = self.recipe, image.shape[:2]
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        while True:
            limit = random.choice(recipe.crop_ious)
            if limit is None:
                return image, boxes, labels
            for _ in range(recipe.crop_trials):
                scale = random.uniform(*recipe.crop_scale)
                low, high = recipe.crop_ratio
                ratio = random.uniform(max(low, scale**2), min(high, scale**-2)) ** 0.5
                w, h = int(scale * ratio * width), int(scale / ratio * height)
                left, top = (
                    random.randrange(max(width - w, 1)),
                    random.randrange(max(height - h, 1)),
                )
                window = np.array([left, top, left + w, top + h])
                if overlap(boxes, window).min() < limit:
                    continue
                inside = ((window[:2] < center) & (center < window[2:])).all(axis=1)
                if not inside.any():
                    continue
                corner = np.tile(window[:2], 2)
                cut = boxes[inside].clip(corner, np.tile(window[2:], 2)) - corner
                return image[top : top + h, left : left + w], cut, labels[inside]

    def colour(self, image: np.ndarray) -> np.ndarray:
        recipe, image = self.recipe, image.copy()
        if random.randrange(2):
            image = whole(
                image.astype(float) + random.uniform(-recipe.brightness, recipe.brightness)
            )
        if random.randrange(2):
            image = whole(image * random.uniform(*recipe.contrast))
        image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        if random.randrange(2):
            hue = image[..., 0].astype(int) + random.randint(-recipe.hue, recipe.hue)
            image[..., 0] = hue % 180
        if random.randrange(2):
            image[..., 1] = whole(image[..., 1] * random.uniform(*recipe.saturation))
        return cv2.cvtColor(image, cv2.COLOR_HSV2BGR)

    def expand(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        recipe, (height, width) = self.recipe, image.shape[:2]
        if random.random() > recipe.expand_probability:
            return image, boxes
        while True:
            scale = random.uniform(*recipe.expand_scale)
            low, high = recipe.expand_ratio
            ratio = random.uniform(max(low, scale**-2), min(high, scale**2)) ** 0.5
            if scale * ratio >= 1 and scale / ratio >= 1:
                break
        w, h = int(scale * ratio * width), int(scale / ratio * height)
        left, top = random.randint(0, w - width), random.randint(0, h - height)
        canvas = np.empty((h, w, 3), np.uint8)
        canvas[:] = recipe.mean
        canvas[top : top + height, left : left + width] = image
        return canvas, boxes + np.array([left, top, left, top])


def whole(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def overlap(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """IoU (n,) of boxes (n, 4) with a window (4,)."""
    low, high = np.maximum(boxes[:, :2], window[:2]), np.minimum(boxes[:, 2:], window[2:])
    shared = np.prod(high - low, axis=1) * (low < high).all(axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return shared / (areas + np.prod(window[2:] - window[:2]) - shared)


class ReferenceLoss:
    """Multibox loss of raw outputs: location and class."""

    def __init__(self, recipe: Recipe, num_classes: int):
        self.recipe, self.channels = recipe, num_classes + 1
        self.priors = make_anchors(recipe)

    def match(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Target offsets (P, 4) and channels (P,) of one image; labels count from 1."""
        priors, count = to_ltrb(self.priors), len(self.priors)
        shape = (len(boxes), count, 2)
        low = torch.max(boxes[:, None, :2].expand(shape), priors[None, :, :2].expand(shape))
        high = torch.min(boxes[:, None, 2:].expand(shape), priors[None, :, 2:].expand(shape))
        sides = (high - low).clamp(min=0)
        shared = sides[..., 0] * sides[..., 1]
        areas, own = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (boxes, priors))
        iou = shared / (areas.unsqueeze(1).expand_as(shared) + own.expand_as(shared) - shared)
        prior_of_box = iou.max(dim=1).indices
        best, matched = iou.max(dim=0)
        best.index_fill_(0, prior_of_box, 2)
        for box in range(len(boxes)):
            matched[prior_of_box[box]] = box
        channel = labels[matched]
        channel[best < self.recipe.match_iou] = 0
        target = to_cxcywh(boxes[matched])
        center, size = self.priors[:, :2], self.priors[:, 2:]
        shift = (target[:, :2] - center) / (self.recipe.center_variance * size)
        scale = (target[:, 2:] / size).log() / self.recipe.size_variance
        return torch.cat([shift, scale], dim=1), channel

    def __call__(self, outputs: tuple[Tensor, Tensor], boxes: list, labels: list) -> Tensor:
        offsets, logits = outputs
        truth = [self.match(*image) for image in zip(boxes, labels, strict=True)]
        target, channel = (torch.stack(part) for part in zip(*truth, strict=True))
        positive = channel > 0
        mask = positive.unsqueeze(2).expand_as(offsets)
        box_loss = F.smooth_l1_loss(offsets[mask], target[mask], reduction="sum")

        rows = logits.reshape(-1, self.channels)
        highest = rows.detach().max()
        total = (rows - highest).exp().sum(dim=1, keepdim=True).log() + highest
        mining = total - rows.gather(1, channel.view(-1, 1))
        mining[positive.view(-1, 1)] = 0
        rank = mining.view(len(boxes), -1).sort(dim=1, descending=True).indices.sort(dim=1).indices
        positives = positive.long().sum(dim=1, keepdim=True)
        hardest = (self.recipe.negative_ratio * positives).clamp(max=positive.shape[1] - 1)
        chosen = positive | (rank < hardest)
        picked = logits[chosen.unsqueeze(2).expand_as(logits)].view(-1, self.channels)
        class_loss = F.cross_entropy(picked, channel[chosen], reduction="sum")
        return (box_loss + class_loss) / positives.sum().clamp(min=1)


@functools.cache
def compiled_soft_nms():
    """`soft_nms` of soft_nms.c."""
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


def reference_detect(outputs: tuple[Tensor, Tensor], size: tuple, recipe: Recipe) -> tuple:
    """Boxes, scores and labels of one image of `size` (height, width), by class; not clipped."""
    offsets, logits = (output[0] for output in outputs)
    soft_nms, (height, width) = compiled_soft_nms(), size
    boxes = to_ltrb(decode(offsets, make_anchors(recipe), recipe)).numpy()
    boxes = boxes * np.float32([width, height, width, height])
    scores = logits.softmax(dim=1).numpy()
    found, labels = [], []
    for channel in range(1, scores.shape[1]):
        passed = np.where(scores[:, channel] > recipe.score_threshold)[0]
        if not len(passed):
            continue
        rows = np.hstack([boxes[passed], scores[passed, channel, None]])
        left = soft_nms(rows, len(rows), recipe.soft_nms_iou, recipe.soft_nms_min_score)
        found.append(rows[: min(left, recipe.max_per_class)])
        labels += [channel - 1] * len(found[-1])
    rows = torch.from_numpy(np.concatenate(found))
    return rows[:, :4], rows[:, 4], torch.tensor(labels)


class ReferenceM2Det(M2Det):
    """The network with the leach module computed anew for every level."""

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__(recipe, num_classes)
        leach = self.leach[0]
        leach.uses, leach.bn.momentum = 1, 0.01

    def pyramid(self, base: Tensor) -> list[Tensor]:
        pyramids, x = [], self.leach[0](base)
        for level in range(1, self.levels + 1):
            if level > 1:
                x = torch.cat([self.leach[level - 1](base), pyramids[-1][-1]], dim=1)
            pyramids.append(getattr(self, f"unet{level}")(x))
        sources = [torch.cat(maps, dim=1) for maps in zip(*pyramids, strict=True)][::-1]
        return [self.Norm(sources[0]), *sources[1:]]
