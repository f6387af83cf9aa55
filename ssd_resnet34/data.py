"""COCO records to uint8 images and padded boxes: what the loader's workers do.

A worker decodes, crops and resizes. It draws all random numbers of a sample from (seed, epoch,
position in the epoch), so that neither the number of workers or ranks nor a resume changes a
sample. Colour, flip and normalisation follow on the device (augment.py).
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.arithmetic import ceil_div, round_up
from common.coco.images import ImageReader
from common.coco.index import CocoIndex
from common.coco.sampling import EpochRecords, repeat_factors
from common.errors import UserError
from common.npu.device import memory_format
from common.npu.distributed import Ranks
from common.npu.loading import loader_options
from common.npu.operators import constant
from ssd_resnet34.config import NO_CROP, Recipe

NO_COLOUR_JITTER = (1.0, 1.0, 1.0, 0.0)
# Whether a square image, and one turned by 180 degrees, is turned by its EXIF orientation: the
# original reads with Pillow, which does not.
TURNS_IF_BOTH_FIT = False


class Batch(NamedTuple):
    """N training samples; `boxes` and `labels` are padded to M, `valid` marks the real ones.

    Without the axis of N it is one sample.
    """

    images: Tensor  # (N, H, W, 3) uint8 RGB
    boxes: Tensor  # (N, M, 4) float32 normalised xyxy
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    flip: Tensor  # (N,) bool
    # Factors of brightness, contrast and saturation; shift of hue in turns
    colour_jitter: Tensor  # (N, 4) float32
    operation_order: Tensor  # (N, 4) int64: columns of `colour_jitter` in the order of their use
    image_ids: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device, asynchronously from pinned memory; the ids stay on the host."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            boxes=self.boxes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            flip=self.flip.to(device, non_blocking=True),
            colour_jitter=self.colour_jitter.to(device, non_blocking=True),
            operation_order=self.operation_order.to(device, non_blocking=True),
            image_ids=self.image_ids,
        )

    def split(self, size: int) -> list["Batch"]:
        """Split into batches of `size` samples."""
        fields = [tensor.split(size) for tensor in self]
        return [Batch(*tensors) for tensors in zip(*fields, strict=True)]


class NormalisedWindow(NamedTuple):
    """The part of an image that a crop keeps, normalised to the image's width and height."""

    left: float
    top: float
    right: float
    bottom: float


def training_records(index: CocoIndex) -> CocoIndex:
    """Return the images with at least one annotation, crowd included, as the port trains on."""
    num_annotations = np.diff(index.offsets)
    return index.subset(num_annotations > 0)


def untrained_boxes(index: CocoIndex) -> dict[str, np.ndarray]:
    """Return, by reason, which boxes (A,) of an index are not trained on."""
    boxes = normalised_boxes(index)
    return {"too small for fp32": ~has_area(boxes)}


def has_area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return which boxes (n, 4) have an area."""
    return (boxes_xyxy[:, :2] < boxes_xyxy[:, 2:]).all(axis=1)


class TrainingSet(Dataset):
    """`dataset[epoch, position, record]` is a sample: the fields of a Batch without N."""

    def __init__(self, records: CocoIndex, recipe: Recipe, seed: int):
        self.records = records
        self.recipe = recipe
        self.seed = seed
        self.reader = ImageReader(records, TURNS_IF_BOTH_FIT)
        self.max_boxes = records.max_boxes()
        self.boxes = normalised_boxes(records)
        self.labels = records.table.label

    def __len__(self) -> int:
        return len(self.records)

    def ground_truth(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (n, 4) float32 normalised xyxy, without empty ones, and labels (n,)."""
        start, end = self.records.offsets[record : record + 2]
        boxes = self.boxes[start:end]
        labels = self.labels[start:end]
        is_used = has_area(boxes)
        return boxes[is_used], labels[is_used]

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, record = key
        image = self.reader.read(record)
        boxes, labels = self.ground_truth(record)
        flip = False
        colour_jitter = NO_COLOUR_JITTER
        operation_order = [0, 1, 2, 3]
        if self.recipe.augment:
            rng = random.Random(f"{self.seed} {epoch} {position}")  # a text is hashed by SHA-512
            window = crop_window(boxes, self.recipe, rng)
            if window is not None:
                image, boxes, labels = apply_crop(image, boxes, labels, window)
            flip = rng.random() < self.recipe.flip_probability
            operation_order = rng.sample(range(4), 4)
            colour_jitter = draw_colour_jitter(self.recipe, rng)

        num_boxes = len(boxes)
        padded_boxes = np.zeros((self.max_boxes, 4), dtype=np.float32)
        padded_boxes[:num_boxes] = boxes
        padded_labels = np.zeros(self.max_boxes, dtype=np.int64)
        padded_labels[:num_boxes] = labels
        return Batch(
            images=resize(image, self.recipe.image_size),
            boxes=torch.from_numpy(padded_boxes),
            labels=torch.from_numpy(padded_labels),
            valid=torch.from_numpy(np.arange(self.max_boxes) < num_boxes),
            flip=torch.from_numpy(np.array(flip)),
            colour_jitter=torch.from_numpy(np.array(colour_jitter, dtype=np.float32)),
            operation_order=torch.from_numpy(np.array(operation_order)),
            image_ids=torch.from_numpy(np.array(self.records.image_ids[record])),
        )


def normalised_boxes(records: CocoIndex) -> np.ndarray:
    """Return the boxes of all annotations, (A, 4) float32 normalised xyxy."""
    x, y, width, height = records.table.box_xywh.T
    num_annotations = np.diff(records.offsets)
    image_heights, image_widths = np.repeat(records.sizes, num_annotations, axis=0).T
    left = x / image_widths
    top = y / image_heights
    right = (x + width) / image_widths
    bottom = (y + height) / image_heights
    return np.stack([left, top, right, bottom], axis=1).astype(np.float32)


def draw_colour_jitter(recipe: Recipe, rng: random.Random) -> tuple[float, float, float, float]:
    """Draw the colour jitter of a sample, as a Batch has it."""
    brightness = rng.uniform(1 - recipe.brightness, 1 + recipe.brightness)
    contrast = rng.uniform(1 - recipe.contrast, 1 + recipe.contrast)
    saturation = rng.uniform(1 - recipe.saturation, 1 + recipe.saturation)
    hue = rng.uniform(-recipe.hue, recipe.hue)
    return brightness, contrast, saturation, hue


def crop_window(
    boxes_xyxy: np.ndarray, recipe: Recipe, rng: random.Random
) -> NormalisedWindow | None:
    """Draw a crop that suits the boxes (n, 4), or None for the whole image.

    Every box must overlap the window by more than the drawn IoU, and at least one must have its
    centre inside. If the window fails, the IoU is drawn anew as well (SSD paper section 2.2, in
    MLPerf's form).
    """
    boxes = boxes_xyxy.tolist()  # so few boxes are several times faster as Python's numbers
    min_ratio, max_ratio = recipe.crop_ratio
    while True:
        min_iou = rng.choice(recipe.crop_ious)
        if min_iou is NO_CROP:
            return None
        width = rng.uniform(*recipe.crop_scale)
        height = rng.uniform(*recipe.crop_scale)
        if not min_ratio <= width / height <= max_ratio:
            continue
        left = rng.uniform(0, 1 - width)
        top = rng.uniform(0, 1 - height)
        window = NormalisedWindow(left, top, left + width, top + height)
        overlapping = all(window_iou(window, box) > min_iou for box in boxes)
        if overlapping and any(has_center_inside(window, box) for box in boxes):
            return window


def window_iou(window: NormalisedWindow, box: list[float]) -> float:
    """Return the IoU of a window and a box xyxy."""
    left, top, right, bottom = box
    width = min(window.right, right) - max(window.left, left)
    height = min(window.bottom, bottom) - max(window.top, top)
    overlap = max(width, 0) * max(height, 0)
    box_area = (right - left) * (bottom - top)
    window_area = (window.right - window.left) * (window.bottom - window.top)
    return overlap / (box_area + window_area - overlap)


def has_center_inside(window: NormalisedWindow, box: list[float]) -> bool:
    """Return whether the centre of a box xyxy lies inside a window."""
    left, top, right, bottom = box
    center_x = (left + right) / 2
    center_y = (top + bottom) / 2
    return window.left < center_x < window.right and window.top < center_y < window.bottom


def apply_crop(
    image: np.ndarray, boxes_xyxy: np.ndarray, labels: np.ndarray, window: NormalisedWindow
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut image (H, W, 3), boxes (n, 4) and labels (n,) to a window.

    Boxes whose centre lies outside are dropped.
    """
    keep = []
    cut_boxes = []
    for index, box in enumerate(boxes_xyxy.tolist()):
        if has_center_inside(window, box):
            keep.append(index)
            cut_boxes.append(cut_box(box, window))
    boxes = np.array(cut_boxes, dtype=np.float32).reshape(-1, 4)
    return cut_pixels(image, window), boxes, labels[keep]


def cut_box(box: list[float], window: NormalisedWindow) -> list[float]:
    """Clip a box xyxy to a window and normalise it to that."""
    left, top, right, bottom = box
    width = window.right - window.left
    height = window.bottom - window.top
    return [
        (max(left, window.left) - window.left) / width,
        (max(top, window.top) - window.top) / height,
        (min(right, window.right) - window.left) / width,
        (min(bottom, window.bottom) - window.top) / height,
    ]


def cut_pixels(image: np.ndarray, window: NormalisedWindow) -> np.ndarray:
    """Return a view of the pixels of an image (H, W, 3) in a window, at least one of them."""
    height, width = image.shape[:2]
    left = int(window.left * width)
    top = int(window.top * height)
    right = max(left + 1, int(window.right * width))
    bottom = max(top + 1, int(window.bottom * height))
    return image[top:bottom, left:right]


def resize(image: np.ndarray, size: int) -> Tensor:
    """Return an image (H, W, 3) uint8 as (size, size, 3), within a grey level of Pillow's.

    The resampling is bilinear with antialiasing.
    """
    # Permuted after the batch axis is there: torch then sees channels last and keeps it.
    planes = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).squeeze(0).contiguous()


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Return images (N, H, W, 3) in 0..255 as network input (N, 3, H, W) float32.

    Its memory layout is the one that convolutions on the device are fastest in.
    """
    mean = constant(recipe.mean, images.device)
    std = constant(recipe.std, images.device)
    normalised = images.float().div(255).sub_(mean).div_(std)
    planes = normalised.permute(0, 3, 1, 2)
    return planes.contiguous(memory_format=memory_format(images.device))


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """Return the network input (3, 300, 300) float32 of an image (H, W, 3) uint8 RGB."""
    resized = resize(image, recipe.image_size)
    return normalise(resized.unsqueeze(0), recipe).squeeze(0)


def epoch_records(records: CocoIndex, recipe: Recipe) -> EpochRecords:
    """Return which records an epoch has."""
    factors = repeat_factors(records, recipe.balance)
    return EpochRecords([np.arange(len(records))], recipe.repeat, factors)


def iterations_per_epoch(records: CocoIndex, recipe: Recipe, world_size: int) -> int:
    """Return the steps of an epoch, in which all ranks together go through its images once."""
    global_batch = recipe.batch_size * world_size
    return ceil_div(len(epoch_records(records, recipe)), global_batch)


def epoch_order(length: int, batch_size: int, world_size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `length` records in an epoch: a permutation that fills its last batch.

    A batch has `batch_size` records on each of `world_size` ranks; the last one is filled from the
    beginning of the order. The seed is `seed + epoch`.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(length, generator=generator)
    extended_length = round_up(length, batch_size * world_size)
    return order.repeat(ceil_div(extended_length, length))[:extended_length]


class TrainingOrder(Sampler):
    """The batches of this rank, from iteration `start` to `end`; a batch lists keys of TrainingSet.

    One pass goes through all epochs, so that workers never restart between them. Rank r takes every
    world-size-th position of an epoch, beginning with r.
    """

    def __init__(
        self, records: CocoIndex, recipe: Recipe, ranks: Ranks, seed: int, start: int, end: int
    ):
        if not len(records):
            raise UserError("no image of the training set has an annotation; check --data_path")
        self.epoch_records = epoch_records(records, recipe)
        self.batch_size = recipe.batch_size
        self.ranks = ranks
        self.seed = seed
        self.start = start
        self.end = end
        self.steps_per_epoch = iterations_per_epoch(records, recipe, ranks.world_size)

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        world_size = self.ranks.world_size
        global_batch = self.batch_size * world_size
        order = []
        order_epoch = -1
        for iteration in range(self.start, self.end):
            epoch = iteration // self.steps_per_epoch
            if epoch != order_epoch:
                positions = epoch_order(
                    len(self.epoch_records), self.batch_size, world_size, self.seed, epoch
                )
                records = self.epoch_records.of_epoch(self.seed, epoch)
                order = records[positions.numpy()].tolist()
                order_epoch = epoch
            first = iteration % self.steps_per_epoch * global_batch
            positions = range(first + self.ranks.rank, first + global_batch, world_size)
            yield [(epoch, position, order[position]) for position in positions]


class EvaluationSet(Dataset):
    """Resized images (H, W, 3) uint8, each with its original (height, width) and its image id."""

    def __init__(self, records: CocoIndex, recipe: Recipe):
        self.records = records
        self.recipe = recipe
        self.reader = ImageReader(records, TURNS_IF_BOTH_FIT)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        image = self.reader.read(record)
        size = torch.tensor(self.records.sizes[record], dtype=torch.int64)
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
    """Return the loader of this rank.

    In training it yields the Batch of each iteration from `start` to `end`, by default to the
    last epoch's end. In evaluation it yields every image of the rank once.
    """
    if ranks is None:
        ranks = Ranks()
    options = loader_options(workers, pin_memory)
    if not training:
        shard = records.subset(np.arange(ranks.rank, len(records), ranks.world_size))
        return DataLoader(EvaluationSet(shard, recipe), recipe.eval_batch_size, **options)

    if end is None:
        end = recipe.epochs * iterations_per_epoch(records, recipe, ranks.world_size)
    order = TrainingOrder(records, recipe, ranks, seed, start, end)
    return DataLoader(TrainingSet(records, recipe, seed), batch_sampler=order, **options)


def largest_sample(recipe: Recipe, records: CocoIndex) -> Batch:
    """Return a training batch of one image, whose tensors are as large as those of any other."""
    loader = build_loader(replace(recipe, batch_size=1), records, training=True, end=1)
    return next(iter(loader))
