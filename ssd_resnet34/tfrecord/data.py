"""Records to uint8 crops and padded boxes: what the loader's workers do.

A worker reads, decodes and crops; it draws every number of a sample's augmentation from
(seed, epoch, position in the epoch), so that neither the number of workers nor that of ranks nor a
resumed run changes a sample. Flip, colour jitter and normalisation follow on the device
(augment.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError
from common.npu.distributed import Ranks
from common.npu.loading import loader_options
from ssd_resnet34.data import epoch_order, normalise
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.index import RecordIndex, RecordReader

NO_COLOUR_JITTER = (0, 1, 1, 0)
NO_BOXES_REMEDY = "there is nothing to train on; check --training_file_pattern"
MIN_AREA = 1e-12  # the IoU of two empty boxes is 0


class Batch(NamedTuple):
    """N samples; `boxes` are padded to M rows, `valid` marks the real ones."""

    images: Tensor  # (N, H, W, 3) uint8 RGB
    boxes: Tensor  # (N, M, 4) float32 normalised xyxy
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    flip: Tensor  # (N,) bool
    # Added brightness; factors of contrast and saturation; shift of hue in turns
    colour_jitter: Tensor  # (N, 4) float32
    image_ids: Tensor  # (N,) int64, -1 for none

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device, asynchronously from pinned memory; the ids stay on the host."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            boxes=self.boxes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            flip=self.flip.to(device, non_blocking=True),
            colour_jitter=self.colour_jitter.to(device, non_blocking=True),
            image_ids=self.image_ids,
        )


def training_records(records: RecordIndex) -> RecordIndex:
    """Return the records with at least one box, crowd included."""
    return records.subset(records.num_boxes > 0)


def trained_records_line(records: RecordIndex) -> str:
    """Return a line that says how many boxes and records of the training files are trained on.

    A record's boxes are all trained on. Raise UserError where there is none.
    """
    num_boxes = records.num_boxes.sum()
    num_without = np.count_nonzero(records.num_boxes == 0)
    line = f"{num_boxes} of {num_boxes} boxes are trained on"
    if num_without:
        line += f"; left out: {num_without} of {len(records)} records, without a box"
    if num_boxes == 0:
        raise UserError(f"{records.path(0)}: {line}", NO_BOXES_REMEDY)
    return line


def sample(image: np.ndarray, rows: Tensor, columns: Tensor) -> Tensor:
    """Interpolate an image (H, W, 3) uint8 bilinearly where h rows and w columns cross.

    `rows` (h,) and `columns` (w,) are in pixels, from the centre of the first pixel; beyond the
    last pixel its value continues. The result (h, w, 3) is float32.
    """
    height, width = image.shape[:2]
    above, below, down = neighbours(rows, height)
    left, right, across = neighbours(columns, width)
    pixels = torch.from_numpy(image)
    # index_select takes a third of the time of indexing with brackets.
    upper_lines = pixels.index_select(0, above).float()
    lower_lines = pixels.index_select(0, below).float()
    lines = torch.lerp(upper_lines, lower_lines, down.view(-1, 1, 1))
    left_values = lines.index_select(1, left)
    right_values = lines.index_select(1, right)
    return torch.lerp(left_values, right_values, across.view(1, -1, 1))


def neighbours(positions: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixel before each position, the one after it, and the weight of the second."""
    before = positions.floor()
    weight = positions - before
    before = before.long().clamp(max=count - 1)
    after = (before + 1).clamp(max=count - 1)
    return before, after, weight


def resize(image: np.ndarray, size: int) -> Tensor:
    """Resize an image (H, W, 3) uint8 for evaluation, to (size, size, 3) float32 in 0..255.

    Bilinear without antialias, sampled at the upper left corner of each cell, not at its centre, as
    TensorFlow does unless told otherwise.
    """
    height, width = image.shape[:2]
    steps = torch.arange(size, dtype=torch.float32)
    rows = steps * (torch.tensor(float(height)) / size)
    columns = steps * (torch.tensor(float(width)) / size)
    return sample(image, rows, columns)


def resize_crop(image: np.ndarray, size: int) -> Tensor:
    """Resize an image (H, W, 3) uint8 for training, to (size, size, 3) uint8.

    Bilinear without antialias: the first and the last pixel of the result are those of the image,
    as TensorFlow's `crop_and_resize` has it.
    """
    # Permuted after the batch axis is there, torch sees channels last and keeps it.
    planes = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(planes, (size, size), mode="bilinear", align_corners=True)
    return resized.permute(0, 2, 3, 1).squeeze(0).contiguous()


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """Return the evaluation input (3, 300, 300) float32 of an image (H, W, 3) uint8 RGB."""
    resized = resize(image, recipe.image_size)
    return normalise(resized.unsqueeze(0), recipe).squeeze(0)


def crop_window(
    boxes_xyxy: np.ndarray, image_shape: tuple[int, ...], recipe: Recipe, rng: np.random.Generator
) -> np.ndarray | None:
    """Draw a window to crop, (4,) float32 normalised xyxy, or None for the whole image.

    `boxes_xyxy` (n, 4) normalised; `image_shape` begins with height, width. Each attempt either
    takes the whole image or draws a limit and several windows, of which it takes the last one that
    every box overlaps by an IoU above the limit and that contains the centre of a box. Where there
    is no such window, another attempt follows (SSD paper section 2.2, TensorFlow's form).
    """
    while rng.random() >= recipe.uncropped_probability:
        min_iou = recipe.crop_ious[rng.integers(len(recipe.crop_ious))]
        windows = draw_windows(image_shape, recipe, rng)
        overlapping = (pairwise_iou(windows, boxes_xyxy) > min_iou).all(axis=1)
        usable = overlapping & contains_center(windows, boxes_xyxy).any(axis=1)
        if usable.any():
            last = np.flatnonzero(usable)[-1]
            return windows[last].astype(np.float32)
    return None


def draw_windows(
    image_shape: tuple[int, ...], recipe: Recipe, rng: np.random.Generator
) -> np.ndarray:
    """Draw windows (w, 4) float64 normalised xyxy, at most `crop_windows`.

    Those of an aspect ratio that the recipe excludes are left out. The edges of the others are
    moved to the nearest centres of pixels.
    """
    sizes = rng.uniform(*recipe.crop_scale, (recipe.crop_windows, 2))
    top_left = rng.random(sizes.shape) * (1 - sizes)
    windows = np.concatenate([top_left, top_left + sizes], axis=1)
    narrowest, widest = recipe.crop_ratio
    ratios = sizes[:, 0] / sizes[:, 1]
    windows = windows[(ratios > narrowest) & (ratios < widest)]
    last_pixel = last_pixel_xyxy(image_shape)
    return np.rint(windows * last_pixel) / last_pixel


def last_pixel_xyxy(image_shape: tuple[int, ...]) -> np.ndarray:
    """Return the pixel coordinates that 1 stands for in each coordinate of a window, at least 1."""
    height, width = image_shape[:2]
    return np.maximum([width - 1, height - 1, width - 1, height - 1], 1)


def pairwise_iou(windows_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return the IoU (w, n) of windows (w, 4) with boxes (n, 4)."""
    left, top, right, bottom = windows_xyxy.T[..., np.newaxis]
    box_left, box_top, box_right, box_bottom = boxes_xyxy.T
    width = np.minimum(right, box_right) - np.maximum(left, box_left)
    height = np.minimum(bottom, box_bottom) - np.maximum(top, box_top)
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    window_area = (right - left) * (bottom - top)
    box_area = (box_right - box_left) * (box_bottom - box_top)
    union = window_area + box_area - intersection
    return intersection / np.maximum(union, MIN_AREA)


def contains_center(windows_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return (w, n) bool: whether a window (w, 4) has the centre of a box (n, 4) inside."""
    left, top, right, bottom = windows_xyxy.T[..., np.newaxis]
    box_left, box_top, box_right, box_bottom = boxes_xyxy.T
    center_x = (box_left + box_right) / 2
    center_y = (box_top + box_bottom) / 2
    inside_x = (center_x > left) & (center_x < right)
    inside_y = (center_y > top) & (center_y < bottom)
    return inside_x & inside_y


def crop_image(image: np.ndarray, window_xyxy: np.ndarray) -> np.ndarray:
    """Cut an image (H, W, 3) to a window, normalised xyxy, the pixels at its edges included."""
    pixels = np.rint(window_xyxy * last_pixel_xyxy(image.shape)).astype(int)
    left, top, right, bottom = pixels
    return image[top : bottom + 1, left : right + 1]


def crop_boxes(boxes_xyxy: np.ndarray, window_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the boxes (n, 4) with their centre in a window, clipped to it and relative to it.

    Return them, (k, 4) float32, and the mask (n,) bool that selects them.
    """
    inside = contains_center(window_xyxy[np.newaxis], boxes_xyxy)[0]
    top_left = window_xyxy[:2]
    bottom_right = window_xyxy[2:]
    corners = boxes_xyxy[inside].reshape(-1, 2, 2).clip(top_left, bottom_right)
    corners = (corners - top_left) / (bottom_right - top_left)
    return corners.reshape(-1, 4).astype(np.float32), inside


def draw_colour_jitter(recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Draw the colour jitter of a sample, as a Batch has it."""
    largest = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return np.array(NO_COLOUR_JITTER) + rng.uniform(-1, 1, 4) * largest


class TrainingSet(Dataset):
    """`dataset[epoch, position, record]` is a sample, the fields of a Batch without N."""

    def __init__(self, records: RecordIndex, recipe: Recipe, seed: int):
        self.records = records
        self.recipe = recipe
        self.seed = seed
        self.reader = RecordReader(records)
        self.max_boxes = records.max_boxes()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, record = key
        annotated = self.reader.read(record)
        boxes = annotated.boxes_xyxy
        labels = self.records.labels(annotated, record)
        image = self.records.pixels(annotated, record)

        rng = np.random.default_rng((self.seed, epoch, position))
        flip = False
        colour_jitter = np.array(NO_COLOUR_JITTER)
        if self.recipe.augment:
            window = crop_window(boxes, image.shape, self.recipe, rng)
            if window is not None:
                image = crop_image(image, window)
                boxes, inside = crop_boxes(boxes, window)
                labels = labels[inside]
            flip = rng.random() < self.recipe.flip_probability
            colour_jitter = draw_colour_jitter(self.recipe, rng)

        padded_boxes = np.zeros((self.max_boxes, 4), np.float32)
        padded_boxes[: len(boxes)] = boxes
        padded_labels = np.zeros(self.max_boxes, np.int64)
        padded_labels[: len(labels)] = labels
        return Batch(
            images=resize_crop(image, self.recipe.image_size),
            boxes=torch.from_numpy(padded_boxes),
            labels=torch.from_numpy(padded_labels),
            valid=torch.arange(self.max_boxes) < len(boxes),
            flip=torch.tensor(flip),
            colour_jitter=torch.tensor(colour_jitter, dtype=torch.float32),
            image_ids=torch.tensor(annotated.image_id),
        )


class EvaluationSet(Dataset):
    """Resized float32 images (H, W, 3) in 0..255, original (height, width) and image id."""

    def __init__(self, records: RecordIndex, recipe: Recipe):
        self.records = records
        self.recipe = recipe

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        annotated = self.records.read(record)
        image = self.records.pixels(annotated, record)
        size = torch.tensor(image.shape[:2])
        image_id = torch.tensor(annotated.image_id)
        return resize(image, self.recipe.image_size), size, image_id


class TrainingOrder(Sampler):
    """This rank's batches of (epoch, position, record), from iteration `start` up to `end`.

    The permutations of the epochs follow one another without a gap: every record is seen once an
    epoch, and a batch may end one epoch and begin the next. Rank r takes every world-size-th
    element, from the r-th on.
    """

    def __init__(
        self, records: RecordIndex, recipe: Recipe, ranks: Ranks, seed: int, start: int, end: int
    ):
        if not len(records):
            raise UserError("no record has a box; check --training_file_pattern")
        self.num_records = len(records)
        self.batch_size = recipe.batch_size
        self.ranks = ranks
        self.seed = seed
        self.start = start
        self.end = end

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        world_size = self.ranks.world_size
        global_batch_size = self.batch_size * world_size
        order = []
        order_epoch = -1
        for iteration in range(self.start, self.end):
            batch = []
            for index_in_batch in range(self.ranks.rank, global_batch_size, world_size):
                index_in_run = iteration * global_batch_size + index_in_batch
                epoch, position = divmod(index_in_run, self.num_records)
                if epoch != order_epoch:
                    # A batch of one, since an epoch is not filled up to its last batch here.
                    order = epoch_order(
                        self.num_records, batch_size=1, world_size=1, seed=self.seed, epoch=epoch
                    ).tolist()
                    order_epoch = epoch
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
    """Return the loader of this rank.

    For training it yields the Batches of iterations `start` up to `end` (by default that of a
    complete run), else every evaluation image of the rank once.
    """
    ranks = ranks or Ranks()
    options = loader_options(workers, pin_memory)
    if not training:
        of_this_rank = np.arange(ranks.rank, len(records), ranks.world_size)
        images = EvaluationSet(records.subset(of_this_rank), recipe)
        return DataLoader(images, recipe.eval_batch_size, **options)
    if end is None:
        end = recipe.total_steps(ranks.world_size)
    order = TrainingOrder(records, recipe, ranks, seed, start, end)
    return DataLoader(TrainingSet(records, recipe, seed), batch_sampler=order, **options)


def largest_sample(recipe: Recipe, records: RecordIndex) -> Batch:
    """Return a training batch of one image, whose tensors are as large as those of any other."""
    loader = build_loader(replace(recipe, batch_size=1), records, training=True, end=1)
    return next(iter(loader))
