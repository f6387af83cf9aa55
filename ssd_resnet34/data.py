"""COCO records to uint8 images and padded boxes: what the loader's workers do.

A worker decodes, crops and resizes; it draws every number of a sample's augmentation from
(seed, epoch, position in the epoch), so that neither the number of workers nor that of ranks nor
a resumed run changes a sample. Colour, flip and normalisation follow on the device (augment.py).
"""

import functools
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.coco.images import EncodedImage, open_image, read_image
from common.coco.index import CocoIndex
from common.errors import UserError
from common.npu.device import memory_format
from common.npu.distributed import Ranks
from common.npu.loading import loader_options
from ssd_resnet34.config import Recipe

Box = tuple[float, float, float, float]  # left, top, right, bottom
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # the `jitter` that changes nothing


class Batch(NamedTuple):
    """N samples; `boxes` are padded to M rows, `valid` marks the real ones."""

    images: Tensor  # (N, H, W, 3) uint8 RGB
    boxes: Tensor  # (N, M, 4) float32 normalised ltrb
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    flip: Tensor  # (N,) bool
    jitter: Tensor  # (N, 4) float32: brightness, contrast, saturation factor; hue shift in turns
    order: Tensor  # (N, 4) int64: which of the four comes first, second, ...
    image_ids: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """On the device, asynchronously where pinned; the ids stay on the host."""
        moved = (part.to(device, non_blocking=True) for part in self[:-1])
        return Batch(*moved, self.image_ids)


def training_records(index: CocoIndex) -> CocoIndex:
    """The images with at least one annotation, crowd included, as the original trains on."""
    return index.subset(np.diff(index.offsets) > 0)


def resize(image: np.ndarray, size: int) -> Tensor:
    """Image (H, W, 3) uint8 to (size, size, 3): bilinear with antialias, Pillow's to a level."""
    # Permuted after the batch axis is there: torch then sees channels last and keeps it.
    planes = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).squeeze(0).contiguous()


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Images (N, H, W, 3) in 0..255 to (N, 3, H, W) float32, normalised, in the device's layout."""
    mean, std = _constant(recipe.mean, images.device), _constant(recipe.std, images.device)
    planes = images.float().div(255).sub_(mean).div_(std).permute(0, 3, 1, 2)
    return planes.contiguous(memory_format=memory_format(images.device))


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """The evaluation input (3, 300, 300) float32 of an image (H, W, 3) uint8 RGB."""
    return normalise(resize(image, recipe.image_size).unsqueeze(0), recipe).squeeze(0)


def crop_window(boxes_ltrb: np.ndarray, recipe: Recipe, rng: random.Random) -> Box | None:
    """A random crop: window (left, top, right, bottom), normalised, or None for the whole image.

    `boxes_ltrb` (n, 4) normalised. Every box must overlap the window by more than the drawn IoU,
    at least one centre lie in it; a window that fails starts anew with another draw of the limit
    (SSD paper section 2.2, MLPerf's form).
    """
    boxes = boxes_ltrb.tolist()  # for so few boxes plain numbers are several times as fast
    narrowest, widest = recipe.crop_ratio
    while True:
        limit = rng.choice(recipe.crop_ious)
        if limit is None:
            return None
        width, height = rng.uniform(*recipe.crop_scale), rng.uniform(*recipe.crop_scale)
        if not narrowest <= width / height <= widest:
            continue
        x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        window = x, y, x + width, y + height
        overlapping = all(_iou(window, box) > limit for box in boxes)
        if overlapping and any(_center_inside(window, box) for box in boxes):
            return window


def _center_inside(window: Box, box: Box) -> bool:
    return (
        window[0] < (box[0] + box[2]) / 2 < window[2]
        and window[1] < (box[1] + box[3]) / 2 < window[3]
    )


def _iou(window: Box, box: Box) -> float:
    left, top, right, bottom = window
    x1, y1, x2, y2 = box
    width, height = min(right, x2) - max(left, x1), min(bottom, y2) - max(top, y1)
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - overlap)


def apply_crop(
    image: np.ndarray | EncodedImage, boxes_ltrb: np.ndarray, labels: np.ndarray, window: Box
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut image and boxes to a window; boxes whose centre lies outside are dropped."""
    left, top, right, bottom = window
    across, down = right - left, bottom - top
    boxes = boxes_ltrb.tolist()
    kept = [k for k, box in enumerate(boxes) if _center_inside(window, box)]
    moved = np.empty((len(kept), 4), np.float32)
    for row, (x1, y1, x2, y2) in enumerate(boxes[k] for k in kept):
        moved[row, :2] = (max(x1, left) - left) / across, (max(y1, top) - top) / down
        moved[row, 2:] = (min(x2, right) - left) / across, (min(y2, bottom) - top) / down
    height, width = image.shape[:2]
    y, x = int(top * height), int(left * width)
    # At least a pixel, of an image that is but a few wide or high.
    cut = image[y : max(y + 1, int(bottom * height)), x : max(x + 1, int(right * width))]
    return cut, moved, labels[kept]


class TrainingSet(Dataset):
    """`dataset[epoch, position, record]` is a sample, the fields of a Batch without N."""

    def __init__(self, records: CocoIndex, recipe: Recipe, seed: int):
        self.records, self.recipe, self.seed = records, recipe, seed
        self.slots = records.max_boxes()
        self.slot_numbers = np.arange(self.slots)
        xywh = records.table.box_xywh
        ltrb = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        sizes = np.repeat(records.sizes, np.diff(records.offsets), axis=0)
        ltrb = (ltrb / sizes[:, [1, 0, 1, 0]]).astype(np.float32)
        real = (ltrb[:, :2] < ltrb[:, 2:]).all(axis=1)  # empty boxes are left out
        self.boxes, self.labels = ltrb[real], records.table.label[real]
        self.offsets = np.append(0, np.cumsum(real))[records.offsets]

    def __len__(self) -> int:
        return len(self.records)

    def truth(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) float32 normalised ltrb, labels (n,); empty boxes are left out."""
        rows = slice(*self.offsets[record : record + 2])
        return self.boxes[rows], self.labels[rows]

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, record = key
        recipe = self.recipe
        image = open_image(self.records.path(record))
        boxes, labels = self.truth(record)
        rng = random.Random(f"{self.seed} {epoch} {position}")  # hashed by SHA-512
        flip, jitter, order = False, NEUTRAL, range(4)
        if recipe.augment:
            window = crop_window(boxes, recipe, rng)
            if window is not None:
                image, boxes, labels = apply_crop(image, boxes, labels, window)
            flip = rng.random() < recipe.flip_probability
            order = rng.sample(range(4), 4)
            spans = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
            middles = zip(NEUTRAL, spans, strict=True)
            jitter = [rng.uniform(middle - span, middle + span) for middle, span in middles]
        padded_boxes = np.zeros((self.slots, 4), np.float32)
        padded_labels = np.zeros(self.slots, np.int64)
        padded_boxes[: len(boxes)] = boxes
        padded_labels[: len(labels)] = labels
        rest = (
            padded_boxes,
            padded_labels,
            self.slot_numbers < len(boxes),
            np.array(flip),
            np.array(jitter, np.float32),
            np.array(order),
            self.records.image_ids[record, ...],
        )
        return Batch(resize(image[:], recipe.image_size), *map(torch.from_numpy, rest))


def epoch_order(length: int, seed: int, epoch: int, multiple: int) -> Tensor:
    """A permutation seeded by seed + epoch, extended from its own beginning to a multiple."""
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(length, generator=generator)
    total = -(-length // multiple) * multiple
    return order.repeat(-(-total // length))[:total]


class TrainingOrder(Sampler):
    """This rank's batches of (epoch, position, record), from any iteration to the run's last.

    One pass over it is a whole run: workers never restart between epochs. Of each epoch's order
    rank r takes every world-size-th element.
    """

    def __init__(self, length: int, batch_size: int, ranks: Ranks, seed: int, start: int, end: int):
        if not length:
            raise UserError("no image of the training set has an annotation; check --data_path")
        self.length, self.batch_size, self.ranks, self.seed = length, batch_size, ranks, seed
        self.start, self.end = start, end
        self.per_epoch = iterations_per_epoch(length, batch_size, ranks.world_size)

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        step = self.batch_size * self.ranks.world_size
        epoch, order = -1, None
        for iteration in range(self.start, self.end):
            if iteration // self.per_epoch != epoch:
                epoch = iteration // self.per_epoch
                order = epoch_order(self.length, self.seed, epoch, step).tolist()
            first = iteration % self.per_epoch * step + self.ranks.rank
            positions = range(first, first + step, self.ranks.world_size)
            yield [(epoch, position, order[position]) for position in positions]


def iterations_per_epoch(length: int, batch_size: int, world_size: int) -> int:
    return -(-length // (batch_size * world_size))


class EvaluationSet(Dataset):
    """Resized uint8 images (H, W, 3) with image id and original (height, width)."""

    def __init__(self, records: CocoIndex, recipe: Recipe):
        self.records, self.recipe = records, recipe

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        image = read_image(self.records.path(record))
        size = torch.from_numpy(self.records.sizes[record].astype(np.int64))
        image_id = torch.tensor(self.records.image_ids[record])
        return resize(image, self.recipe.image_size), size, image_id


def build_loader(
    recipe: Recipe,
    records: CocoIndex,
    training: bool,
    *,
    ranks: Ranks | None = None,
    workers: int = 0,
    seed: int = 0,
    start: int = 0,
    end: int | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """The loader of this rank: training Batches of iterations `start` to `end` (default: of the
    whole run), or every evaluation image of the rank once."""
    ranks = ranks or Ranks()
    options = loader_options(workers, pin_memory)
    if not training:
        mine = records.subset(np.arange(ranks.rank, len(records), ranks.world_size))
        return DataLoader(EvaluationSet(mine, recipe), recipe.eval_batch_size, **options)
    per_epoch = iterations_per_epoch(len(records), recipe.batch_size, ranks.world_size)
    end = recipe.epochs * per_epoch if end is None else end
    order = TrainingOrder(len(records), recipe.batch_size, ranks, seed, start, end)
    return DataLoader(TrainingSet(records, recipe, seed), batch_sampler=order, **options)
