"""COCO records to uint8 images and padded boxes: what the loader's workers do.

A worker decodes, expands, crops and resizes; it draws every number of a sample's augmentation from
(seed, epoch, position in the epoch), so that neither the number of workers nor a resumed run
changes a sample. Colour, flip and normalisation follow on the device (augment.py).
"""

import functools
import random
import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.coco.images import open_image, read_image
from common.coco.index import CocoIndex
from common.errors import UserError
from common.npu.device import memory_format
from common.npu.distributed import Ranks
from ssd_mmdet.config import Recipe
from ssd_mmdet.geometry import (
    canvas_around,
    center_inside,
    crop_window,
    cut,
    resize_as_opencv,
)

NEUTRAL = (0.0, 1.0, 1.0, 0.0)  # the `jitter` that changes nothing
SMALLEST_IMAGE = 32  # pixels; the original does not train on an image with a shorter side


class Batch(NamedTuple):
    """N samples; `boxes` are padded to M rows, `valid` marks the real ones.

    `images` are black where an expanded canvas shows. Of the window's columns, and of its rows, the
    image takes those from `place[..., 0]` up to `place[..., 1]`; there are `place[..., 2]`.
    """

    images: Tensor  # (N, S, S, 3) uint8 RGB
    place: Tensor  # (N, 2, 3) float32, pixels before resizing, of columns and of rows
    boxes: Tensor  # (N, M, 4) float32 xyxy, pixels of the network input
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    flip: Tensor  # (N,) bool
    jitter: Tensor  # (N, 4) float32: grey levels added, contrast, saturation factor, degrees of hue
    order: Tensor  # (N, 3) int64: which channel comes first, second, third
    image_ids: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """On the device, asynchronously where pinned; the ids stay on the host."""
        moved = (part.to(device, non_blocking=True) for part in self[:-1])
        return Batch(*moved, self.image_ids)


def training_records(index: CocoIndex) -> CocoIndex:
    """The images with at least one annotation, crowd included, that are not tiny."""
    annotated = np.diff(index.offsets) > 0
    return index.subset(annotated & (index.sizes.min(axis=1) >= SMALLEST_IMAGE))


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Images (N, H, W, 3) in 0..255 to (N, 3, H, W) float32, mean subtracted, in the device's
    layout."""
    planes = images.float().sub_(constant(recipe.mean, images.device)).permute(0, 3, 1, 2)
    return planes.contiguous(memory_format=memory_format(images.device))


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """The evaluation input (3, 300, 300) float32 of an image (H, W, 3) uint8 RGB."""
    made = resize_as_opencv(image, recipe.image_size, recipe.image_size)
    return normalise(torch.from_numpy(made).unsqueeze(0), recipe).squeeze(0)


def colour_draws(recipe: Recipe, rng: random.Random) -> tuple[list[float], list[int]]:
    """Random numbers of the colour step: `jitter` and `order` of a Batch.

    Each of the five changes happens with probability 1/2. The original multiplies by the contrast
    before the change of saturation and hue or after it; both give the same.
    """

    def half_of_the_time(low: float, high: float, otherwise: float) -> float:
        return rng.uniform(low, high) if rng.randrange(2) else otherwise

    jitter = [
        half_of_the_time(-recipe.brightness, recipe.brightness, 0.0),
        half_of_the_time(*recipe.contrast, 1.0),
        half_of_the_time(*recipe.saturation, 1.0),
        half_of_the_time(-recipe.hue, recipe.hue, 0.0),
    ]
    return jitter, rng.sample(range(3), 3) if rng.randrange(2) else [0, 1, 2]


class TrainingSet(Dataset):
    """`dataset[epoch, position, record]` is a sample, the fields of a Batch without N."""

    def __init__(self, records: CocoIndex, recipe: Recipe, seed: int):
        self.records, self.recipe, self.seed = records, recipe, seed
        self.slots = records.max_boxes()
        self.slot_numbers = np.arange(self.slots)
        table = records.table
        start, sides = table.box_xywh[:, :2], table.box_xywh[:, 2:]
        boxes = np.concatenate([start, start + sides], axis=1, dtype=np.float32)
        used = (sides >= 1).all(axis=1) & ~(table.area <= 0) & ~table.ignore
        real, crowd = used & ~table.crowd, used & table.crowd
        self.boxes, self.labels, self.crowds = boxes[real], table.label[real], boxes[crowd]
        self.offsets, self.crowd_offsets = (
            np.append(0, np.cumsum(kind))[records.offsets] for kind in (real, crowd)
        )

    def __len__(self) -> int:
        return len(self.records)

    def truth(self, record: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (n, 4) float32 xyxy in pixels, not clipped, labels (n,), crowd boxes (k, 4).

        Boxes with a side below a pixel, without area or marked to be ignored are left out.
        """
        rows = slice(*self.offsets[record : record + 2])
        crowds = slice(*self.crowd_offsets[record : record + 2])
        return self.boxes[rows], self.labels[rows], self.crowds[crowds]

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, record = key
        recipe, size = self.recipe, self.recipe.image_size
        image = open_image(self.records.path(record))
        boxes, labels, crowds = self.truth(record)
        height, width = image.shape[:2]
        rng = random.Random(f"{self.seed} {epoch} {position}")  # hashed by SHA-512
        left, top, flip, jitter, order = 0, 0, False, NEUTRAL, range(3)
        if recipe.augment:
            jitter, order = colour_draws(recipe, rng)
            width, height, left, top = canvas_around(width, height, recipe, rng)
            everything = [
                (x1 + left, y1 + top, x2 + left, y2 + top)
                for x1, y1, x2, y2 in (*boxes.tolist(), *crowds.tolist())
            ]
            window = crop_window(width, height, everything, recipe, rng)
            if window is not None:
                inside = [k for k in range(len(boxes)) if center_inside(window, everything[k])]
                boxes, labels = boxes[inside], labels[inside]
                left, top = left - window[0], top - window[1]
                width, height = window[2] - window[0], window[3] - window[1]
            flip = rng.random() < recipe.flip_probability
        image, place = cut(image, left, top, width, height, size)
        boxes = boxes + np.float32([left, top, left, top])
        boxes *= np.float32([size / width, size / height, size / width, size / height])
        padded_boxes = np.zeros((self.slots, 4), np.float32)
        padded_labels = np.zeros(self.slots, np.int64)
        padded_boxes[: len(boxes)] = np.minimum(np.maximum(boxes, 0), size)
        padded_labels[: len(labels)] = labels
        parts = (
            image,
            place,
            padded_boxes,
            padded_labels,
            self.slot_numbers < len(boxes),
            np.array(flip),
            np.array(jitter, np.float32),
            np.array(order),
            self.records.image_ids[record, ...],
        )
        return Batch(*map(torch.from_numpy, parts))


def groups_of(records: CocoIndex, recipe: Recipe) -> list[np.ndarray]:
    """Positions in the repeated training set of upright (or square) and of landscape images.

    A batch of the original holds one kind only; position p is the record p modulo their number.
    """
    landscape = np.tile(records.sizes[:, 1] > records.sizes[:, 0], recipe.repeat)
    groups = [np.flatnonzero(~landscape), np.flatnonzero(landscape)]
    return [group for group in groups if len(group)]


def iterations_per_epoch(records: CocoIndex, recipe: Recipe, world_size: int) -> int:
    """Steps of an epoch of `repeat` passes, each group extended to whole batches on all ranks."""
    step = recipe.batch_size * world_size
    return sum(-(-len(group) // step) for group in groups_of(records, recipe))


def epoch_order(
    groups: list[np.ndarray], batch_size: int, world_size: int, seed: int
) -> np.ndarray:
    """The order of one epoch: batches of one group each, shuffled; rank r has the r-th part.

    As in the original, one process draws from numpy's legacy generator and fills a group up with
    random repeats, several draw from torch's and fill up with the group's beginning.
    """
    step, parts = batch_size * world_size, []
    numpy = np.random.RandomState(seed % 2**32)
    torch_generator = torch.Generator().manual_seed(seed)
    for group in groups:
        total = -(-len(group) // step) * step
        if world_size == 1:
            order = group.copy()
            numpy.shuffle(order)
            parts += [order, numpy.choice(order, total - len(order))]
        else:
            order = group[torch.randperm(len(group), generator=torch_generator).numpy()]
            parts.append(np.resize(order, total))
    batches = np.concatenate(parts).reshape(-1, batch_size)
    if world_size == 1:
        return batches[numpy.permutation(len(batches))].reshape(-1)
    return batches[torch.randperm(len(batches), generator=torch_generator).numpy()].reshape(-1)


class TrainingOrder(Sampler):
    """This rank's batches of (epoch, position, record), from any iteration to the run's last.

    One pass over it is a whole run: workers never restart between epochs.
    """

    def __init__(
        self, records: CocoIndex, recipe: Recipe, ranks: Ranks, seed: int, start: int, end: int
    ):
        if not len(records):
            raise UserError("no image of the training set has an annotation; check --data_path")
        self.groups, self.length = groups_of(records, recipe), len(records)
        self.batch_size, self.ranks, self.seed = recipe.batch_size, ranks, seed
        self.start, self.end = start, end
        self.per_epoch = iterations_per_epoch(records, recipe, ranks.world_size)

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, order = -1, None
        mine = self.ranks.rank * self.per_epoch
        for iteration in range(self.start, self.end):
            if iteration // self.per_epoch != epoch:
                epoch = iteration // self.per_epoch
                order = epoch_order(
                    self.groups, self.batch_size, self.ranks.world_size, self.seed + epoch
                )
            first = (mine + iteration % self.per_epoch) * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [(epoch, position, int(order[position]) % self.length) for position in positions]


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
        made = resize_as_opencv(image, self.recipe.image_size, self.recipe.image_size)
        return torch.from_numpy(made), size, image_id


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
    options = {"num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": quiet_worker}
    if workers:
        options["prefetch_factor"] = 4
    if not training:
        mine = records.subset(np.arange(ranks.rank, len(records), ranks.world_size))
        return DataLoader(EvaluationSet(mine, recipe), recipe.eval_batch_size, **options)
    if end is None:
        end = recipe.epochs * iterations_per_epoch(records, recipe, ranks.world_size)
    order = TrainingOrder(records, recipe, ranks, seed, start, end)
    return DataLoader(TrainingSet(records, recipe, seed), batch_sampler=order, **options)


def quiet_worker(worker: int) -> None:
    """Ctrl-C and a SIGTERM to the whole process group are the main process's to handle: while it
    finishes its step and saves, a worker must not die; it does a minute later at the latest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
