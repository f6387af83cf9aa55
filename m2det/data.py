"""COCO records to uint8 images and padded boxes: what the loader's workers do.

A worker decodes, crops, expands, mirrors and resizes, in one pass over the pixels that are seen
(resample.py). It draws every number of a sample's augmentation from (seed, epoch, position in the
epoch), so that neither the number of workers nor that of ranks nor a resumed run changes a sample.
Colour and normalisation follow on the device (augment.py).
"""

import functools
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.coco.images import open_image, read_image
from common.coco.index import CocoIndex, find_coco, read_index
from common.errors import UserError
from common.npu.device import memory_format
from common.npu.distributed import Ranks
from m2det.config import Recipe
from m2det.resample import render, resize

# The parts of a split: annotation set and image folder.
LAYOUTS = {
    2017: {"train": [("train2017", "train2017")], "val": [("val2017", "val2017")]},
    2014: {
        "train": [("train2014", "images/train2014"), ("valminusminival2014", "images/val2014")],
        "val": [("minival2014", "images/val2014")],
    },
}


class Batch(NamedTuple):
    """N samples; `boxes` are padded to M rows, `valid` marks the real ones."""

    images: Tensor  # (N, S, 3, S) uint8 RGB: column, channel, row, as the resampler makes them
    boxes: Tensor  # (N, M, 4) float32 normalised ltrb
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    picture: Tensor  # (N, 4) float32 ltrb in pixels: what is no canvas and changes its colour
    colour: Tensor  # (N, 4) float32: added, factor, hue shift (of 180), factor of saturation
    image_ids: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """On the device, asynchronously where pinned; the ids stay on the host."""
        moved = (part.to(device, non_blocking=True) for part in self[:-1])
        return Batch(*moved, self.image_ids)


class Geometry(NamedTuple):
    """How an image becomes the network's input; integers in pixels."""

    window: tuple[int, int, int, int]  # left, top, right, bottom of what is cut out
    canvas: tuple[int, int]  # width, height of the canvas it is put on
    place: tuple[int, int]  # left, top of it there
    mirror: bool  # of the canvas
    interpolation: str


def find_files(
    data_path: str, split: str, annotations: str = "", images: str = ""
) -> list[tuple[str, str]]:
    """The annotation files and image folders that make up `split` ("train", "val").

    `data_path` has the layout of COCO 2017 or the original's of COCO 2014, whichever is there;
    `annotations` and `images`, where given, name one pair instead. Raises UserError.
    """
    if annotations or images:
        return [find_coco(data_path, split, annotations, images)]
    folder = data_path or ("." if os.path.isdir("annotations") else "~/data/coco")
    folder = os.path.expanduser(folder)
    for parts in (layout[split] for layout in LAYOUTS.values()):
        found = [
            (f"{folder}/annotations/instances_{name}.json", f"{folder}/{place}")
            for name, place in parts
        ]
        if all(os.path.isfile(file) and os.path.isdir(place) for file, place in found):
            return found
    needed = " or ".join(
        ", ".join(f"annotations/instances_{name}.json, {place}/" for name, place in layout[split])
        for layout in LAYOUTS.values()
    )
    raise UserError(
        f"--data_path {folder}: needs {needed}; bash download_dataset.sh fetches COCO 2017"
    )


def read_records(
    files: Sequence[tuple[str, str]], classes: Sequence[str] | None = None
) -> CocoIndex:
    """One index of all the files; `classes` as in `read_index`."""
    parts = []
    for pair in files:
        parts.append(read_index(*pair, classes=classes))
        classes = parts[0].class_names
    if len(parts) == 1:
        return parts[0]
    report = {}
    for part in parts:
        for rule, entries in part.report.items():
            report[rule._replace(file=part.annotation_file)] = entries
    ends = np.cumsum([part.offsets[-1] for part in parts[:-1]])
    offsets = [part.offsets[1:] + end for part, end in zip(parts[1:], ends, strict=True)]
    return replace(
        parts[0],
        image_dir="",
        image_ids=np.concatenate([part.image_ids for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        file_names=np.array(
            [os.fsencode(part.path(i)) for part in parts for i in range(len(part))]
        ),
        offsets=np.concatenate([parts[0].offsets, *offsets]),
        table=np.concatenate([part.table for part in parts]).view(np.recarray),
        report=report,
    )


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Images (N, H, W, 3) RGB in 0..255 to (N, 3, H, W) float32 BGR less the mean."""
    planes = images.flip(3).float().sub_(_constant(recipe.mean, images.device))
    return planes.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(images.device))


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """The evaluation input (3, S, S) float32 of an image (H, W, 3) uint8 RGB."""
    return normalise(resize(image, recipe.image_size).unsqueeze(0), recipe).squeeze(0)


def crop_window(boxes_xyxy: np.ndarray, size: tuple[int, int], recipe: Recipe, rng) -> tuple:
    """A random window (left, top, right, bottom) in pixels, maybe the whole image.

    `boxes_xyxy` (n, 4) float64 pixels, at least one; `size` (width, height). The worst overlap of
    a box with the window must reach the drawn IoU and one centre lie in it; after `crop_trials`
    failures the IoU is drawn anew (SSD paper section 2.2).
    """
    width, height = size
    x1, y1, x2, y2 = boxes_xyxy.T
    center_x, center_y, areas = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) * (y2 - y1)
    # A box shares at most its own area with a window, and no window has fewer pixels than this.
    fewest = max(recipe.crop_scale[0] ** 2 * width * height - width - height, 1)
    reachable = areas.min() / fewest
    while True:
        limit = recipe.crop_ious[rng.integers(len(recipe.crop_ious))]
        if limit is None:
            return 0, 0, width, height
        if limit > reachable:
            continue
        scale = rng.uniform(*recipe.crop_scale, (recipe.crop_trials, 1))
        # Uniform by hand, and whole numbers by floor: numpy is slow where the limits are arrays.
        drawn, along_x, along_y = rng.random((3, *scale.shape))
        least = np.maximum(recipe.crop_ratio[0], scale * scale)
        most = np.minimum(recipe.crop_ratio[1], 1 / (scale * scale))
        ratio = np.sqrt(least + (most - least) * drawn)
        w, h = np.floor(scale * ratio * width), np.floor(scale / ratio * height)
        left = np.floor(along_x * np.maximum(width - w, 1))
        top = np.floor(along_y * np.maximum(height - h, 1))
        right, bottom = left + w, top + h
        inside = (left < center_x) & (center_x < right) & (top < center_y) & (center_y < bottom)
        shared_x = np.minimum(x2, right) - np.maximum(x1, left)
        shared_y = np.minimum(y2, bottom) - np.maximum(y1, top)
        overlap = np.maximum(shared_x, 0) * np.maximum(shared_y, 0)
        iou = overlap / (areas + w * h - overlap)
        good = inside.any(axis=1) & (iou.min(axis=1) >= limit)
        if good.any():
            first = good.argmax()
            return tuple(int(side[first, 0]) for side in (left, top, right, bottom))


def expansion(size: tuple[int, int], recipe: Recipe, rng) -> tuple[tuple, tuple]:
    """A random canvas (width, height) for a picture of `size`, and the picture's (left, top)."""
    if rng.random() > recipe.expand_probability:
        return size, (0, 0)
    while True:
        scale = rng.uniform(*recipe.expand_scale)
        least, most = recipe.expand_ratio
        ratio = rng.uniform(max(least, 1 / scale**2), min(most, scale**2)) ** 0.5
        if scale * ratio < 1 or scale / ratio < 1:
            continue
        canvas = int(scale * ratio * size[0]), int(scale / ratio * size[1])
        place = [int(rng.integers(c - s + 1)) for c, s in zip(canvas, size, strict=True)]
        return canvas, tuple(place)


def draw_geometry(boxes_xyxy: np.ndarray, size: tuple[int, int], recipe: Recipe, rng) -> Geometry:
    """Crop, expansion, mirror and interpolation of an image of `size` (width, height) pixels."""
    window = crop_window(boxes_xyxy, size, recipe, rng)
    canvas, place = expansion((window[2] - window[0], window[3] - window[1]), recipe, rng)
    mirror = bool(rng.random() < recipe.flip_probability)
    return Geometry(window, canvas, place, mirror, _interpolation(recipe, rng))


def _interpolation(recipe: Recipe, rng) -> str:
    return recipe.interpolations[rng.integers(len(recipe.interpolations))]


def _unchanged(size: tuple[int, int], interpolation: str) -> Geometry:
    return Geometry((0, 0, *size), size, (0, 0), False, interpolation)


def move_boxes(
    boxes_xyxy: np.ndarray, labels: np.ndarray, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) in pixels of the image to normalised ltrb of the input, float64.

    Those whose centre lies outside the window are dropped, the others clipped to it.
    """
    low, high = np.array(geometry.window).reshape(2, 2)
    corners = boxes_xyxy.reshape(-1, 2, 2)
    center = (corners[:, 0] + corners[:, 1]) / 2
    inside = ((low < center) & (center < high)).all(axis=1)
    corners = corners[inside].clip(low, high) + (geometry.place - low)
    if geometry.mirror:
        corners[..., 0] = geometry.canvas[0] - corners[:, ::-1, 0]
    return (corners / geometry.canvas).reshape(-1, 4), labels[inside]


def draw_colour(recipe: Recipe, rng) -> np.ndarray:
    """What is added, factor, hue shift, factor of saturation; each with probability one half."""
    drawn = (
        rng.uniform(-recipe.brightness, recipe.brightness),
        rng.uniform(*recipe.contrast),
        rng.integers(-recipe.hue, recipe.hue + 1),
        rng.uniform(*recipe.saturation),
    )
    return np.where(rng.integers(2, size=4), drawn, (0, 1, 0, 1))


def _original_boxes(records: CocoIndex) -> tuple[np.ndarray, np.ndarray]:
    """All boxes (N, 4) float64 xyxy in pixels, crowds too, and which (N,) the original keeps.

    The last pixel counts as inside: a box is a pixel smaller than its width in the file.
    """
    xywh = records.table["box_xywh"]
    last = np.repeat(records.sizes[:, ::-1] - 1, np.diff(records.offsets), axis=0)
    low = np.maximum(xywh[:, :2], 0)
    high = np.minimum(low + np.maximum(xywh[:, 2:] - 1, 0), last)
    real = (low <= high).all(axis=1) & ~(records.table["area"] <= 0)
    return np.concatenate([low, high], axis=1), real


class TrainingSet(Dataset):
    """`dataset[epoch, position, record]` is a sample, the fields of a Batch without N."""

    def __init__(self, records: CocoIndex, recipe: Recipe, seed: int):
        self.records, self.recipe, self.seed = records, recipe, seed
        self.slots = records.max_boxes()
        boxes, real = _original_boxes(records)
        self.boxes, self.labels = boxes[real], records.table["label"][real]
        self.offsets = np.concatenate([[0], real.cumsum()])[records.offsets]

    def __len__(self) -> int:
        return len(self.records)

    def truth(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) float64 xyxy in pixels and labels (n,) as the original has them."""
        rows = slice(*self.offsets[record : record + 2])
        return self.boxes[rows], self.labels[rows]

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, record = key
        recipe = self.recipe
        image = open_image(self.records.path(record))
        size = image.shape[1], image.shape[0]
        truth = self.truth(record)
        rng = np.random.default_rng((self.seed, epoch, position))
        colour, coloured = np.array([0, 1, 0, 1]), False
        interpolation = _interpolation(recipe, rng) if recipe.augment else "linear"
        geometry, (boxes, labels) = _unchanged(size, interpolation), truth
        if recipe.augment and len(boxes):
            geometry, colour = draw_geometry(boxes, size, recipe, rng), draw_colour(recipe, rng)
            boxes, labels = move_boxes(boxes, labels, geometry)
            large = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=1) > recipe.min_box
            boxes, labels, coloured = boxes[large], labels[large], bool(large.any())
        if not coloured:
            # No box is left: the image as it is, with all that are at least a pixel wide and high.
            geometry = _unchanged(size, interpolation)
            large = (truth[0][:, 2:] - truth[0][:, :2] >= 1).all(axis=1)
            boxes, labels = move_boxes(truth[0][large], truth[1][large], geometry)
        return self.sample(record, image, boxes, labels, geometry, colour, coloured)

    def sample(self, record, image, boxes, labels, geometry, colour, coloured) -> Batch:
        (left, top, right, bottom), canvas, place, mirror, interpolation = geometry
        size, fill = self.recipe.image_size, self.recipe.mean[::-1]
        cut = image[top:bottom, left:right]
        made = render(cut, place, canvas, size, interpolation, mirror, fill)
        picture, _ = move_boxes(np.array([geometry.window]), np.zeros(1), geometry)
        padded_boxes = np.zeros((self.slots, 4), np.float32)
        padded_labels = np.zeros(self.slots, np.int64)
        padded_boxes[: len(boxes)] = boxes
        padded_labels[: len(labels)] = labels
        return Batch(
            made,
            torch.from_numpy(padded_boxes),
            torch.from_numpy(padded_labels),
            torch.arange(self.slots) < len(boxes),
            torch.tensor(picture[0] * size * coloured, dtype=torch.float32),
            torch.tensor(colour, dtype=torch.float32),
            torch.tensor(self.records.image_ids[record]),
        )


def epoch_order(length: int, seed: int, epoch: int, multiple: int) -> Tensor:
    """A permutation seeded by seed + epoch, cut to a multiple, or extended to the first one."""
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(length, generator=generator)
    return order.repeat(-(-multiple // length))[: max(length // multiple, 1) * multiple]


class TrainingOrder(Sampler):
    """This rank's batches of (epoch, position, record), from any iteration to the run's last.

    One pass over it is a whole run: workers never restart between epochs. Of each epoch's order
    rank r takes every world-size-th element.
    """

    def __init__(self, length: int, batch_size: int, ranks: Ranks, seed: int, start: int, end: int):
        if not length:
            raise UserError("the training set has no image; check --data_path")
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
    """Full batches of an epoch; what is left over is dropped, as the original does."""
    return max(1, length // (batch_size * world_size))


class EvaluationSet(Dataset):
    """Resized uint8 images (S, S, 3) with image id and original (height, width)."""

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
    options = {"num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": quiet_worker}
    if workers:
        options["prefetch_factor"] = 4
    if not training:
        mine = records.subset(np.arange(ranks.rank, len(records), ranks.world_size))
        return DataLoader(EvaluationSet(mine, recipe), recipe.eval_batch_size, **options)
    per_epoch = iterations_per_epoch(len(records), recipe.batch_size, ranks.world_size)
    end = recipe.epochs * per_epoch if end is None else end
    order = TrainingOrder(len(records), recipe.batch_size, ranks, seed, start, end)
    return DataLoader(TrainingSet(records, recipe, seed), batch_sampler=order, **options)


def quiet_worker(worker: int) -> None:
    """Ctrl-C and a SIGTERM to the whole process group are the main process's to handle: while it
    finishes its step and saves, a worker must not die; it does a minute later at the latest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
