"""COCO records to uint8 images and padded boxes: what the workers of the loader do.

A worker decodes, crops, expands, flips and resizes an image, in one pass over the pixels that are
visible in the result (resample.py). It draws all random numbers of a sample from (seed, epoch,
position in the epoch), so neither the number of workers or ranks nor a resumed run changes a
sample. Colour jitter and normalisation follow on the device (augment.py).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.arithmetic import ceil_div
from common.coco.images import ImageReader
from common.coco.index import CocoIndex, name_to_bytes, read_index
from common.coco.layout import Files, find_coco
from common.coco.resize import resize_as_opencv
from common.coco.sampling import EpochRecords, repeat_factors
from common.errors import UserError
from common.npu.device import memory_format
from common.npu.distributed import Ranks
from common.npu.loading import loader_options
from common.npu.operators import constant
from m2det.config import Recipe
from m2det.geometry import (
    Geometry,
    draw_geometry,
    draw_interpolation,
    keep_whole,
    move_boxes,
    picture_box,
    smallest_window_sides,
)
from m2det.resample import render

# By split, the annotation sets of COCO 2014, and for each the folder of its images.
COCO_2014 = {
    "train": {
        "train2014": "images/train2014",
        "valminusminival2014": "images/val2014",
    },
    "val": {"minival2014": "images/val2014"},
}
SEED_FOLDER = "~/data/coco"  # where the original and its port look for COCO
NO_COLOUR_JITTER = (0.0, 1.0, 0.0, 1.0)
SMALLEST_BOX_SIDE = 1  # pixels; in an image that stays whole, smaller boxes are left out
# Whether a square image, and one turned by 180 degrees, is turned by its EXIF orientation: the
# original reads with OpenCV, which does.
TURNS_IF_BOTH_FIT = True


class Batch(NamedTuple):
    """N samples; `boxes` are padded to M rows, of which `valid` marks the real ones."""

    images: Tensor  # (N, S, 3, S) uint8 RGB: column, channel, row, as the resampler makes them
    boxes: Tensor  # (N, M, 4) float32 normalised xyxy
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    colour_box: Tensor  # (N, 4) float32 xyxy, pixels of the network input: where colours change
    # Grey levels added, factor of contrast, hue added (of 180), factor of saturation
    colour_jitter: Tensor  # (N, 4) float32
    image_ids: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device, asynchronously from pinned memory; the ids stay on the host."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            boxes=self.boxes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            colour_box=self.colour_box.to(device, non_blocking=True),
            colour_jitter=self.colour_jitter.to(device, non_blocking=True),
            image_ids=self.image_ids,
        )


def find_files(data_path: str, split: str, annotations: str = "", images: str = "") -> list[Files]:
    """Return the annotation files and image folders that make up `split` ("train" or "val").

    `data_path` has the original's layout of COCO 2014, or one that `find_coco` knows. A given
    annotation file or image folder makes up the split alone. Raise UserError for what is missing.
    """
    folder = os.path.expanduser(data_path or default_folder())
    if not annotations and not images:
        files = []
        for name, image_folder in COCO_2014[split].items():
            annotation_file = os.path.join(folder, f"annotations/instances_{name}.json")
            files.append(Files(annotation_file, os.path.join(folder, image_folder), "COCO 2014"))
        if all(os.path.isfile(one.annotation_file) for one in files):
            return files
    return [find_coco(folder, split, annotations, images)]


def default_folder() -> str:
    """Return where COCO is looked for without a --data_path."""
    if os.path.isdir("annotations"):
        return "."
    return SEED_FOLDER


def read_records(
    files: Sequence[Files],
    classes: Sequence[str] | None = None,
    usual_order: Sequence[str] | None = None,
) -> CocoIndex:
    """Read the annotation files of a split into one index.

    `classes` and `usual_order` are those of `read_index`. All files must have the classes of the
    first one; raise UserError if they do not.
    """
    indexes = []
    for file in files:
        index = read_index(file.annotation_file, file.image_dir, classes, usual_order)
        classes = index.class_names
        indexes.append(index)
    if len(indexes) == 1:
        return indexes[0]
    return join_indexes(indexes)


def join_indexes(indexes: list[CocoIndex]) -> CocoIndex:
    """Return one index of the images of several, which have the same classes."""
    offsets = [np.zeros(1, np.int64)]
    num_annotations = 0
    paths = []
    report = {}
    for index in indexes:
        offsets.append(index.offsets[1:] + num_annotations)
        num_annotations += len(index.table)
        for i in range(len(index)):
            paths.append(name_to_bytes(index.path(i)))
        for rule, findings in index.report.items():
            report[rule._replace(file=index.annotation_file)] = findings
    table = np.concatenate([index.table for index in indexes])
    return replace(
        indexes[0],
        image_dir="",
        image_ids=np.concatenate([index.image_ids for index in indexes]),
        sizes=np.concatenate([index.sizes for index in indexes]),
        far_corners=np.concatenate([index.far_corners for index in indexes]),
        file_names=np.array(paths),
        offsets=np.concatenate(offsets),
        table=table.view(np.recarray),
        report=report,
    )


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Subtract the mean from images (N, H, W, 3) RGB in 0..255, and turn them to BGR.

    Return (N, 3, H, W) float32 in the memory format of the device.
    """
    bgr = images.flip(3).float()
    bgr = bgr - constant(recipe.mean, images.device)
    return bgr.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(images.device))


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """Return the network input (3, S, S) float32 for evaluation of an RGB image (H, W, 3) uint8."""
    resized = resize_as_opencv(image, recipe.image_size, recipe.image_size)
    batch = torch.from_numpy(resized).unsqueeze(0)
    return normalise(batch, recipe).squeeze(0)


def draw_colour_jitter(recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Draw the colour jitter (4,) of a sample, as a Batch has it.

    Each of its four changes has probability 1/2.
    """
    jitter = (
        rng.uniform(-recipe.brightness, recipe.brightness),
        rng.uniform(*recipe.contrast),
        rng.integers(-recipe.hue, recipe.hue + 1),
        rng.uniform(*recipe.saturation),
    )
    is_changed = rng.integers(2, size=4) == 1
    return np.where(is_changed, jitter, NO_COLOUR_JITTER)


def boxes_of_pixels(index: CocoIndex) -> np.ndarray:
    """Return all boxes (A, 4) float64 xyxy in pixels, within their images.

    As in the original, the last pixel of a box counts as inside, a box over the left or the upper
    edge is moved in, and one over the right or the lower edge is cut.
    """
    box_xywh = index.table.box_xywh
    image_sizes = np.repeat(index.sizes, np.diff(index.offsets), axis=0)
    last_pixel = image_sizes[:, ::-1] - 1  # x and y
    top_left = np.maximum(box_xywh[:, :2], 0)
    extent = np.maximum(box_xywh[:, 2:] - 1, 0)
    bottom_right = np.minimum(top_left + extent, last_pixel)
    return np.concatenate([top_left, bottom_right], axis=1)


def is_outside(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return which clipped boxes (A, 4) had no pixel inside their image."""
    return (boxes_xyxy[:, :2] > boxes_xyxy[:, 2:]).any(axis=1)


def is_too_thin(boxes_xyxy: np.ndarray, index: CocoIndex, recipe: Recipe) -> np.ndarray:
    """Return which clipped boxes (A, 4) of an index are in no sample, whatever is drawn.

    They are left out where their image stays whole, and even the smallest crop does not enlarge
    them enough.
    """
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    is_left_out = (sides < SMALLEST_BOX_SIDE).any(axis=1)
    if not recipe.augment:
        return is_left_out
    windows = smallest_window_sides(index.sizes, recipe)
    windows_of_boxes = np.repeat(windows, np.diff(index.offsets), axis=0)
    return is_left_out & (sides / windows_of_boxes <= recipe.min_box).any(axis=1)


def untrained_boxes(index: CocoIndex, recipe: Recipe) -> dict[str, np.ndarray]:
    """Return, by reason, which boxes (A,) of an index are not trained on."""
    boxes = boxes_of_pixels(index)
    return {
        "without a pixel inside the image": is_outside(boxes),
        "with a side below 2 pixels, too thin even in the smallest crop": is_too_thin(
            boxes, index, recipe
        ),
    }


class TrainingSet(Dataset):
    """Training samples: `dataset[epoch, position, record]` has the fields of a Batch without N."""

    def __init__(self, records: CocoIndex, recipe: Recipe, seed: int):
        self.records = records
        self.recipe = recipe
        self.seed = seed
        self.reader = ImageReader(records, TURNS_IF_BOTH_FIT)
        self.max_boxes = records.max_boxes()

        # Flat arrays: forked workers share their memory (see CocoIndex).
        boxes = boxes_of_pixels(records)
        is_used = ~is_outside(boxes)
        self.boxes = boxes[is_used]
        self.labels = records.table.label[is_used]
        used_before = np.append(0, np.cumsum(is_used))  # number of used rows before each row
        self.offsets = used_before[records.offsets]

    def __len__(self) -> int:
        return len(self.records)

    def ground_truth(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (n, 4) float64 xyxy in pixels of the image and labels (n,), crowds too."""
        rows = slice(self.offsets[record], self.offsets[record + 1])
        return self.boxes[rows], self.labels[rows]

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, record = key
        image = self.reader.read(record)
        if not self.recipe.augment:
            return self.whole_sample(image, record, interpolation="linear")
        rng = np.random.default_rng((self.seed, epoch, position))
        # As in the original, an image without usable boxes is resized with a draw of its own.
        interpolation = draw_interpolation(self.recipe, rng)
        sample = self.augmented_sample(image, record, rng)
        if sample is None:
            sample = self.whole_sample(image, record, interpolation)
        return sample

    def augmented_sample(
        self, image: np.ndarray, record: int, rng: np.random.Generator
    ) -> Batch | None:
        """Return a randomly changed sample; None where no box is left that is large enough."""
        boxes, labels = self.ground_truth(record)
        if not len(boxes):
            return None
        height, width = image.shape[:2]
        geometry = draw_geometry(boxes, width, height, self.recipe, rng)
        colour_jitter = draw_colour_jitter(self.recipe, rng)
        boxes, labels = move_boxes(boxes, labels, geometry)
        is_large_enough = (boxes[:, 2:] - boxes[:, :2] > self.recipe.min_box).all(axis=1)
        if not is_large_enough.any():
            return None
        boxes = boxes[is_large_enough]
        labels = labels[is_large_enough]

        colour_box = picture_box(geometry) * self.recipe.image_size
        return self.make_sample(image, record, boxes, labels, geometry, colour_box, colour_jitter)

    def whole_sample(self, image: np.ndarray, record: int, interpolation: str) -> Batch:
        """Return the image as it is, resized, with all boxes of at least a pixel."""
        boxes, labels = self.ground_truth(record)
        is_large_enough = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST_BOX_SIDE).all(axis=1)
        height, width = image.shape[:2]
        geometry = keep_whole(width, height, interpolation)
        boxes, labels = move_boxes(boxes[is_large_enough], labels[is_large_enough], geometry)
        nothing = np.zeros(4)
        return self.make_sample(image, record, boxes, labels, geometry, nothing, NO_COLOUR_JITTER)

    def make_sample(
        self,
        image: np.ndarray,
        record: int,
        boxes: np.ndarray,
        labels: np.ndarray,
        geometry: Geometry,
        colour_box: np.ndarray,
        colour_jitter: Sequence[float],
    ) -> Batch:
        """Render the image and pad its boxes (n, 4) normalised xyxy and labels (n,)."""
        window = geometry.window
        rendered = render(
            image[window.top : window.bottom, window.left : window.right],
            geometry.canvas,
            self.recipe.image_size,
            geometry.interpolation,
            geometry.flip,
            fill=self.recipe.mean[::-1],
        )
        padded_boxes = np.zeros((self.max_boxes, 4), np.float32)
        padded_boxes[: len(boxes)] = boxes
        padded_labels = np.zeros(self.max_boxes, np.int64)
        padded_labels[: len(labels)] = labels
        valid = np.zeros(self.max_boxes, bool)
        valid[: len(boxes)] = True
        return Batch(
            images=rendered,
            boxes=torch.from_numpy(padded_boxes),
            labels=torch.from_numpy(padded_labels),
            valid=torch.from_numpy(valid),
            colour_box=torch.tensor(colour_box, dtype=torch.float32),
            colour_jitter=torch.tensor(colour_jitter, dtype=torch.float32),
            image_ids=torch.tensor(self.records.image_ids[record]),
        )


def epoch_order(length: int, batch_size: int, world_size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `length` records in an epoch: a permutation cut to full batches.

    A batch has `batch_size` records on each of `world_size` ranks. The seed is `seed + epoch`. A
    set smaller than one batch is repeated until it fills one.
    """
    global_batch = batch_size * world_size
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(length, generator=generator)
    if length < global_batch:
        repeats = ceil_div(global_batch, length)
        return order.repeat(repeats)[:global_batch]
    return order[: length // global_batch * global_batch]


def epoch_records(records: CocoIndex, recipe: Recipe) -> EpochRecords:
    """Return which records an epoch has."""
    factors = repeat_factors(records, recipe.balance)
    return EpochRecords([np.arange(len(records))], recipe.repeat, factors)


def iterations_per_epoch(records: CocoIndex, recipe: Recipe, world_size: int) -> int:
    """Return the steps of an epoch: those of full batches, as in the original, but at least one."""
    global_batch = recipe.batch_size * world_size
    return max(1, len(epoch_records(records, recipe)) // global_batch)


class TrainingOrder(Sampler):
    """This rank's batches of (epoch, position, record) from iteration `start` to `end`.

    One pass over it is a whole run, so workers never restart between epochs. Rank r takes every
    world_size-th element of an epoch's order, from the r-th on.
    """

    def __init__(
        self, records: CocoIndex, recipe: Recipe, ranks: Ranks, seed: int, start: int, end: int
    ):
        if not len(records):
            raise UserError("the training set has no image; check --data_path")
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
    """Resized images (S, S, 3) uint8 with original size (height, width) and image id."""

    def __init__(self, records: CocoIndex, recipe: Recipe):
        self.records = records
        self.recipe = recipe
        self.reader = ImageReader(records, TURNS_IF_BOTH_FIT)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        image = self.reader.read(record)
        resized = resize_as_opencv(image, self.recipe.image_size, self.recipe.image_size)
        size = torch.from_numpy(self.records.sizes[record].astype(np.int64))
        image_id = torch.tensor(self.records.image_ids[record])
        return torch.from_numpy(resized), size, image_id


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

    In training it yields the Batches of the iterations `start` to `end` (by default the end of the
    run); in evaluation it yields (images, sizes, image ids) of each of the rank's images once.
    Raise UserError where there is nothing to train on.
    """
    ranks = ranks or Ranks()
    options = loader_options(workers, pin_memory)
    if not training:
        records_of_rank = records.subset(np.arange(ranks.rank, len(records), ranks.world_size))
        dataset = EvaluationSet(records_of_rank, recipe)
        return DataLoader(dataset, batch_size=recipe.eval_batch_size, **options)
    if end is None:
        end = recipe.epochs * iterations_per_epoch(records, recipe, ranks.world_size)
    dataset = TrainingSet(records, recipe, seed)
    order = TrainingOrder(records, recipe, ranks, seed, start, end)
    return DataLoader(dataset, batch_sampler=order, **options)


def largest_sample(recipe: Recipe, records: CocoIndex) -> Batch:
    """Return a training batch of one image, whose tensors are as large as those of any other."""
    loader = build_loader(replace(recipe, batch_size=1), records, training=True, end=1)
    return next(iter(loader))
