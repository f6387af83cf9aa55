"""Records to uint8 crops and padded boxes: what the loader's workers do.

A worker reads, decodes and crops; it draws every number of a sample's augmentation from
(seed, epoch, position in the epoch), so that neither the number of workers nor that of ranks nor a
resumed run changes a sample. Flip, colour and normalisation follow on the device (augment.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.coco.images import EncodedImage
from common.errors import UserError
from common.npu.distributed import Ranks
from common.npu.loading import loader_options
from ssd_resnet34.data import epoch_order, normalise
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.example import REMEDY, AnnotatedImage
from ssd_resnet34.tfrecord.index import RecordIndex

WHOLE = np.array([0, 0, 1, 1], np.float32)  # the window of the whole image, which keeps every box


class Batch(NamedTuple):
    """N samples; `boxes` are padded to M rows, `valid` marks the real ones."""

    images: Tensor  # (N, H, W, 3) uint8 RGB
    boxes: Tensor  # (N, M, 4) float32 normalised ltrb
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    flip: Tensor  # (N,) bool
    jitter: Tensor  # (N, 4) float32: brightness added, contrast and saturation factor, hue turns
    image_ids: Tensor  # (N,) int64, -1 for none

    def to(self, device: torch.device) -> "Batch":
        """On the device, asynchronously where pinned; the ids stay on the host."""
        moved = (part.to(device, non_blocking=True) for part in self[:-1])
        return Batch(*moved, self.image_ids)


def training_records(index: RecordIndex) -> RecordIndex:
    """The records with at least one box, crowd included."""
    return index.subset(index.boxes > 0)


def sample(image: np.ndarray, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values (h, w, 3) float32 of an image (H, W, 3) uint8 where h rows and w columns
    cross, in pixels from the first one's centre; beyond the last one, its value."""
    height, width = image.shape[:2]
    top, below, down = _neighbours(rows, height)
    left, right, across = _neighbours(columns, width)
    first, last = int(left[0]), int(right[-1]) + 1
    # Whole rows of plain numbers are quick to pick and to blend.
    pixels = torch.from_numpy(image).view(height, -1)[:, 3 * first : 3 * last]
    lines = pixels.index_select(0, top).float()
    lines.lerp_(pixels.index_select(0, below).float(), down.view(-1, 1))
    channel = torch.arange(3)
    before, after = ((3 * (side - first).view(-1, 1) + channel).view(-1) for side in (left, right))
    blended = lines.index_select(1, before)
    blended.lerp_(lines.index_select(1, after), across.repeat_interleave(3))
    return blended.view(len(rows), len(columns), 3)


def _neighbours(places: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (or columns) before and after each place, and how far it is towards the second."""
    before = places.floor()
    share = places - before
    before = before.long().clamp(max=count - 1)
    return before, (before + 1).clamp(max=count - 1), share


def resize(image: np.ndarray, size: int) -> Tensor:
    """Image (H, W, 3) uint8 to (size, size, 3) float32 in 0..255: bilinear without antialias,
    sampled from the upper left corner of each cell, not its centre."""
    steps = torch.arange(size, dtype=torch.float32)
    rows, columns = (steps * (torch.tensor(float(side)) / size) for side in image.shape[:2])
    return sample(image, rows, columns)


def crop_and_resize(image: np.ndarray | EncodedImage, window: np.ndarray, size: int) -> Tensor:
    """A window (left, top, right, bottom), normalised, of an image as (size, size, 3) uint8.

    Bilinear without antialias: the window's edges, to the nearest pixel, are the centres of the
    first and the last pixel of the result.
    """
    left, top, right, bottom = np.rint(window * _reach(image.shape)).astype(int)
    cut = torch.from_numpy(image[top : bottom + 1, left : right + 1])
    # Permuted after the batch axis is there: torch then sees channels last and keeps it.
    planes = cut.unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(planes, (size, size), mode="bilinear", align_corners=True)
    return resized.permute(0, 2, 3, 1).squeeze(0).contiguous()


def _reach(shape: tuple[int, ...]) -> np.ndarray:
    """From the first to the last pixel's centre, for each of left, top, right, bottom."""
    height, width = shape[:2]
    return np.maximum([width - 1, height - 1, width - 1, height - 1], 1)


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """The evaluation input (3, 300, 300) float32 of an image (H, W, 3) uint8 RGB."""
    return normalise(resize(image, recipe.image_size).unsqueeze(0), recipe).squeeze(0)


def crop_window(
    boxes_ltrb: np.ndarray, shape: tuple[int, ...], recipe: Recipe, rng: np.random.Generator
) -> np.ndarray:
    """A random window (left, top, right, bottom) float32, normalised; the whole image at times.

    Its edges lie on centres of pixels of the image, of which `shape` is height, width.
    Every box must overlap the window by more than the drawn IoU, and at least one centre lie in
    it. Of a try's `crop_windows` the last such one is taken; a try without one is followed by
    another, and each may be the whole image instead.
    """
    tries = rng.geometric(recipe.whole_probability) - 1  # before the one that takes the whole
    if not tries:
        return WHOLE
    limits = np.array(recipe.crop_ious)[rng.integers(len(recipe.crop_ious), size=tries)]
    size = rng.uniform(*recipe.crop_scale, (2, tries * recipe.crop_windows))
    low = rng.random(size.shape) * (1 - size)
    reach = _reach(shape)[:2].reshape(2, 1)
    low, high = np.rint(low * reach) / reach, np.rint((low + size) * reach) / reach

    # What is quick to see first: the shape, then that every box reaches into the window.
    box_low, box_high = boxes_ltrb.T.reshape(2, 2, -1, 1)  # (x and y, boxes, 1)
    narrowest, widest = recipe.crop_ratio
    fit = (size[0] > narrowest * size[1]) & (size[0] < widest * size[1])
    x, y = (low < box_high.min(axis=1)) & (high > box_low.max(axis=1))
    fit = np.flatnonzero(fit & x & y)
    low, high, attempt = low[:, None, fit], high[:, None, fit], fit // recipe.crop_windows
    overlap = _area(np.maximum(low, box_low), np.minimum(high, box_high))
    union = _area(low, high) + _area(box_low, box_high) - overlap
    fit = np.flatnonzero((overlap > limits[attempt] * union).all(axis=0))  # IoU, no division
    low, high, attempt = low[..., fit], high[..., fit], attempt[fit]
    center = (box_low + box_high) / 2
    x, y = (low < center) & (center < high)
    fit = (x & y).any(axis=0)
    if not fit.any():
        return WHOLE
    last = np.flatnonzero(fit & (attempt == attempt[fit][0]))[-1]
    return np.concatenate([low[:, 0, last], high[:, 0, last]]).astype(np.float32)


def _area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    width, height = high - low
    return width * height


def crop_boxes(boxes_ltrb: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) float32 relative to a window, and which of all (m,) they are: those whose centre
    lies inside, clipped."""
    low, high = window[:2], window[2:]
    centers = (boxes_ltrb[:, :2] + boxes_ltrb[:, 2:]) / 2
    inside = ((centers > low) & (centers < high)).all(axis=1)
    corners = boxes_ltrb[inside].reshape(-1, 2, 2).clip(low, high)
    return ((corners - low) / (high - low)).reshape(-1, 4).astype(np.float32), inside


class _Records(Dataset):
    """What training and evaluation share: records, classes by category id."""

    def __init__(self, records: RecordIndex, recipe: Recipe):
        self.records, self.recipe = records, recipe
        self.label_of = {category: k for k, category in enumerate(records.category_ids)}

    def __len__(self) -> int:
        return len(self.records)

    def image(self, found: AnnotatedImage, where: str) -> EncodedImage:
        return EncodedImage(found.encoded, where, REMEDY)


class TrainingSet(_Records):
    """`dataset[epoch, position, record]` is a sample, the fields of a Batch without N."""

    def __init__(self, records: RecordIndex, recipe: Recipe, seed: int):
        super().__init__(records, recipe)
        self.seed, self.slots = seed, records.max_boxes()

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, record = key
        recipe, where = self.recipe, self.records.where(record)
        found = self.records.read(record)
        image, boxes = self.image(found, where), found.boxes_ltrb
        labels = self.labels(found.category_ids, where)
        rng = np.random.default_rng((self.seed, epoch, position))
        window, flip, jitter = WHOLE, False, np.array([0, 1, 1, 0])
        if recipe.augment:
            window = crop_window(boxes, image.shape, recipe, rng)
            flip = rng.random() < recipe.flip_probability
            spans = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
            jitter = jitter + rng.uniform(-1, 1, 4) * spans
            if window is not WHOLE:
                boxes, inside = crop_boxes(boxes, window)
                labels = labels[inside]
        padded_boxes = np.zeros((self.slots, 4), np.float32)
        padded_labels = np.zeros(self.slots, np.int64)
        padded_boxes[: len(boxes)] = boxes
        padded_labels[: len(labels)] = labels
        return Batch(
            crop_and_resize(image, window, recipe.image_size),
            torch.from_numpy(padded_boxes),
            torch.from_numpy(padded_labels),
            torch.arange(self.slots) < len(boxes),
            torch.tensor(flip),
            torch.tensor(jitter, dtype=torch.float32),
            torch.tensor(found.image_id),
        )

    def labels(self, category_ids: np.ndarray, where: str) -> np.ndarray:
        """0-based classes. Raises UserError for a category that the recipe does not know."""
        ids = category_ids.tolist()
        if strange := set(ids) - self.label_of.keys():
            raise UserError(f"{where}: category {min(strange)} is none of the recipe's")
        return np.array([self.label_of[category] for category in ids], np.int64)


class EvaluationSet(_Records):
    """Resized float32 images (H, W, 3) in 0..255, original (height, width) and image id."""

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        where, found = self.records.where(record), self.records.read(record)
        image = self.image(found, where)
        size = torch.tensor(image.shape[:2])
        return resize(image[:], self.recipe.image_size), size, torch.tensor(found.image_id)


class TrainingOrder(Sampler):
    """This rank's batches of (epoch, position, record), from any iteration to the run's last.

    The epochs' permutations follow one another without a gap: every record is seen once an epoch,
    and a batch may end one epoch and begin the next. Rank r takes every world-size-th of them.
    """

    def __init__(self, length: int, batch_size: int, ranks: Ranks, seed: int, start: int, end: int):
        if not length:
            raise UserError("no record has a box; check --training_file_pattern")
        self.length, self.batch_size, self.ranks, self.seed = length, batch_size, ranks, seed
        self.start, self.end = start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        step = self.batch_size * self.ranks.world_size
        current, order = -1, []
        for iteration in range(self.start, self.end):
            batch = []
            first = iteration * step + self.ranks.rank
            for place in range(first, first + step, self.ranks.world_size):
                epoch, position = divmod(place, self.length)
                if epoch != current:
                    current, order = epoch, epoch_order(self.length, self.seed, epoch, 1).tolist()
                batch.append((epoch, position, order[position]))
            yield batch


def build_loader(
    recipe: Recipe,
    records: RecordIndex,
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
    end = recipe.total_steps(ranks.world_size) if end is None else end
    order = TrainingOrder(len(records), recipe.batch_size, ranks, seed, start, end)
    return DataLoader(TrainingSet(records, recipe, seed), batch_sampler=order, **options)
