"""COCO records to uint8 images and padded boxes: what the workers of the loader do.

A worker decodes, expands, crops and resizes an image. It draws all random numbers of a sample from
(seed, epoch, position in the epoch), so neither the number of workers nor a resumed run changes a
sample. Colour jitter, flip and normalisation follow on the device (augment.py).
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.arithmetic import ceil_div, round_up
from common.coco.images import ImageReader
from common.coco.index import CocoIndex
from common.coco.resize import resize_as_opencv
from common.coco.sampling import EpochRecords, repeat_factors
from common.errors import UserError
from common.npu.device import memory_format
from common.npu.distributed import Ranks
from common.npu.loading import loader_options
from common.npu.operators import constant
from ssd_mmdet.config import Recipe
from ssd_mmdet.geometry import (
    Window,
    canvas_around,
    crop_window,
    cut_and_resize,
)

NO_COLOUR_JITTER = (0.0, 1.0, 1.0, 0.0)
RGB = (0, 1, 2)  # the channel order that changes nothing
# The original trains neither on images nor on boxes with a shorter side, in pixels.
SMALLEST_IMAGE_SIDE = 32
SMALLEST_BOX_SIDE = 1
# Whether a square image, and one turned by 180 degrees, is turned by its EXIF orientation: the
# original reads with OpenCV, which does.
TURNS_IF_BOTH_FIT = True


class Batch(NamedTuple):
    """N samples; `boxes` are padded to M rows, of which `valid` marks the real ones."""

    images: Tensor  # (N, S, S, 3) uint8 RGB, black where the canvas shows
    visible_box: Tensor  # (N, 4) float32 xyxy: where in the window the image is, before resizing
    window_size: Tensor  # (N, 2) float32 width and height of the window, before resizing
    boxes: Tensor  # (N, M, 4) float32 xyxy, pixels of the network input
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    flip: Tensor  # (N,) bool
    # Grey levels added, factors of contrast and saturation, degrees of hue added
    colour_jitter: Tensor  # (N, 4) float32
    channel_order: Tensor  # (N, 3) int64: which channel comes first, second and third
    image_ids: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device, asynchronously from pinned memory; the ids stay on the host."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            visible_box=self.visible_box.to(device, non_blocking=True),
            window_size=self.window_size.to(device, non_blocking=True),
            boxes=self.boxes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            flip=self.flip.to(device, non_blocking=True),
            colour_jitter=self.colour_jitter.to(device, non_blocking=True),
            channel_order=self.channel_order.to(device, non_blocking=True),
            image_ids=self.image_ids,
        )


class GroundTruth(NamedTuple):
    """The boxes of I images: of image i the rows from offsets[i] up to offsets[i + 1].

    Flat arrays: forked workers share their memory (see CocoIndex).
    """

    boxes: np.ndarray  # (B, 4) float32 xyxy, pixels of the images
    labels: np.ndarray  # (B,) int64 0-based classes
    offsets: np.ndarray  # (I + 1,) int64
    crowd_boxes: np.ndarray  # (K, 4) float32 xyxy, pixels of the images
    crowd_offsets: np.ndarray  # (I + 1,) int64


def training_records(index: CocoIndex) -> CocoIndex:
    """Return the images to train on: those with an annotation, be it a crowd, and not tiny."""
    is_annotated = np.diff(index.offsets) > 0
    return index.subset(is_annotated & ~small_images(index))


def small_images(index: CocoIndex) -> np.ndarray:
    """Return which images (I,) have a side below `SMALLEST_IMAGE_SIDE`."""
    return index.sizes.min(axis=1) < SMALLEST_IMAGE_SIDE


def untrained_boxes(index: CocoIndex) -> dict[str, np.ndarray]:
    """Return, by reason, which boxes (A,) of an index are not trained on."""
    return {**ignored_boxes(index), "iscrowd": index.table.crowd}


def ignored_boxes(index: CocoIndex) -> dict[str, np.ndarray]:
    """Return, by reason, which boxes (A,) of an index count neither as objects nor as crowds."""
    table = index.table
    side = table.box_xywh[:, 2:].min(axis=1)
    of_small_image = np.repeat(small_images(index), np.diff(index.offsets))
    return {
        f"in an image with a side below {SMALLEST_IMAGE_SIDE} pixels": of_small_image,
        "ignore": table.ignore,
        f"with a side below {SMALLEST_BOX_SIDE} pixel": side < SMALLEST_BOX_SIDE,
    }


def training_ground_truth(records: CocoIndex) -> GroundTruth:
    """Return the boxes that are trained on, all but `untrained_boxes`, and the crowds.

    Crowds are no objects, but a crop keeps clear of them as of objects.
    """
    table = records.table
    is_object = ~_any_of(untrained_boxes(records))
    is_crowd = table.crowd & ~_any_of(ignored_boxes(records))
    x, y, width, height = table.box_xywh.T
    boxes = np.stack([x, y, x + width, y + height], axis=1).astype(np.float32)
    return GroundTruth(
        boxes=boxes[is_object],
        labels=table.label[is_object],
        offsets=_offsets_of_subset(records.offsets, is_object),
        crowd_boxes=boxes[is_crowd],
        crowd_offsets=_offsets_of_subset(records.offsets, is_crowd),
    )


def _any_of(masks: dict[str, np.ndarray]) -> np.ndarray:
    """Return where any of the masks (A,) is true."""
    return np.logical_or.reduce(list(masks.values()))


def _offsets_of_subset(offsets: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """Return where each image's rows begin after all rows but those of the mask are dropped."""
    kept_before = np.append(0, np.cumsum(is_kept))
    return kept_before[offsets]


def normalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Subtract the mean from images (N, H, W, 3) in 0..255.

    Return (N, 3, H, W) float32 in the memory format of the device.
    """
    images = images.float() - constant(recipe.mean, images.device)
    images = images.permute(0, 3, 1, 2)
    return images.contiguous(memory_format=memory_format(images.device))


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """Return the network input (3, S, S) float32 for evaluation of an RGB image (H, W, 3) uint8."""
    resized = resize_as_opencv(image, recipe.image_size, recipe.image_size)
    batch = torch.from_numpy(resized).unsqueeze(0)
    return normalise(batch, recipe).squeeze(0)


def draw_colour_jitter(recipe: Recipe, rng: random.Random) -> tuple[float, float, float, float]:
    """Draw the colour jitter of a sample, as a Batch has it.

    Each of its four changes has probability 1/2. The original changes the contrast at random before
    or after saturation and hue. Both orders give the same image, so here the contrast always comes
    before.
    """

    def draw_or_keep(low: float, high: float, neutral: float) -> float:
        if rng.randrange(2):
            return rng.uniform(low, high)
        return neutral

    brightness = draw_or_keep(-recipe.brightness, recipe.brightness, neutral=0.0)
    contrast = draw_or_keep(*recipe.contrast, neutral=1.0)
    saturation = draw_or_keep(*recipe.saturation, neutral=1.0)
    hue = draw_or_keep(-recipe.hue, recipe.hue, neutral=0.0)
    return brightness, contrast, saturation, hue


def draw_channel_order(rng: random.Random) -> tuple[int, int, int]:
    """Draw the order of a sample's channels, which with probability 1/2 stays RGB."""
    if rng.randrange(2):
        return tuple(rng.sample(range(3), 3))
    return RGB


class TrainingSet(Dataset):
    """Training samples: `dataset[epoch, position, record]` has the fields of a Batch without N."""

    def __init__(self, records: CocoIndex, recipe: Recipe, seed: int):
        self.records = records
        self.recipe = recipe
        self.seed = seed
        self.reader = ImageReader(records, TURNS_IF_BOTH_FIT)
        self.max_boxes = records.max_boxes()

        self.all_boxes = training_ground_truth(records)

    def __len__(self) -> int:
        return len(self.records)

    def ground_truth(self, record: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return boxes (n, 4) float32, their labels (n,) and crowd boxes (k, 4) float32.

        Boxes are xyxy in pixels of the image and not clipped to it.
        """
        boxes, labels, offsets, crowd_boxes, crowd_offsets = self.all_boxes
        objects = slice(offsets[record], offsets[record + 1])
        crowds = slice(crowd_offsets[record], crowd_offsets[record + 1])
        return boxes[objects], labels[objects], crowd_boxes[crowds]

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, record = key
        recipe = self.recipe
        image = self.reader.read(record)
        height, width = image.shape[:2]
        boxes, labels, crowd_boxes = self.ground_truth(record)

        window = Window(0, 0, width, height)
        colour_jitter = NO_COLOUR_JITTER
        channel_order = RGB
        flip = False
        if recipe.augment:
            # Python's generator hashes a text by SHA-512: similar texts give unrelated numbers.
            rng = random.Random(f"{self.seed} {epoch} {position}")
            colour_jitter = draw_colour_jitter(recipe, rng)
            channel_order = draw_channel_order(rng)
            canvas = canvas_around(width, height, recipe, rng)
            all_boxes = boxes.tolist() + crowd_boxes.tolist()
            crop = crop_window(canvas, all_boxes, recipe, rng)
            window = canvas if crop is None else crop
            if crop is not None:
                is_inside = [crop.has_center_of(box) for box in all_boxes[: len(boxes)]]
                is_inside = np.array(is_inside, dtype=bool)
                boxes = boxes[is_inside]
                labels = labels[is_inside]
            flip = rng.random() < recipe.flip_probability

        image, visible_box = cut_and_resize(image, window, recipe.image_size)
        boxes = boxes_in_window(boxes, window, recipe.image_size)
        padded_boxes = np.zeros((self.max_boxes, 4), np.float32)
        padded_boxes[: len(boxes)] = boxes
        padded_labels = np.zeros(self.max_boxes, np.int64)
        padded_labels[: len(labels)] = labels
        valid = np.zeros(self.max_boxes, bool)
        valid[: len(boxes)] = True
        return Batch(
            images=torch.from_numpy(image),
            visible_box=torch.tensor(visible_box, dtype=torch.float32),
            window_size=torch.tensor([window.width, window.height], dtype=torch.float32),
            boxes=torch.from_numpy(padded_boxes),
            labels=torch.from_numpy(padded_labels),
            valid=torch.from_numpy(valid),
            flip=torch.tensor(flip),
            colour_jitter=torch.tensor(colour_jitter, dtype=torch.float32),
            channel_order=torch.tensor(channel_order),
            image_ids=torch.tensor(self.records.image_ids[record]),
        )


def boxes_in_window(boxes: np.ndarray, window: Window, size: int) -> np.ndarray:
    """Return image boxes (n, 4) xyxy in pixels of the window resized to `size`, clipped to it."""
    origin = np.array([window.left, window.top, window.left, window.top], np.float32)
    scale_x = size / window.width
    scale_y = size / window.height
    scale = np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
    return ((boxes - origin) * scale).clip(0, size)


def epoch_records(records: CocoIndex, recipe: Recipe) -> EpochRecords:
    """Return which records an epoch has, upright (or square) ones and landscape ones apart.

    As in the original, each batch is of one group only. A group without images is left out.
    """
    is_landscape = records.sizes[:, 1] > records.sizes[:, 0]
    groups = [np.flatnonzero(~is_landscape), np.flatnonzero(is_landscape)]
    factors = repeat_factors(records, recipe.balance)
    return EpochRecords([group for group in groups if len(group)], recipe.repeat, factors)


def orientation_groups(records: CocoIndex, recipe: Recipe) -> list[np.ndarray]:
    """Return the positions of upright (or square) and of landscape images in an epoch."""
    return epoch_records(records, recipe).groups


def iterations_per_epoch(records: CocoIndex, recipe: Recipe, world_size: int) -> int:
    """Return the steps of an epoch, in which each group fills whole batches on all ranks."""
    global_batch = recipe.batch_size * world_size
    groups = orientation_groups(records, recipe)
    return sum(ceil_div(len(group), global_batch) for group in groups)


def epoch_order(
    groups: list[np.ndarray], batch_size: int, world_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Return the positions of an epoch in shuffled order, batches of one group each.

    Rank r takes the r-th of `world_size` equal sections. As in the original, a single process draws
    from numpy's legacy generator and several draw from torch's, with the seed `seed + epoch`.
    """
    if world_size == 1:
        return _order_for_one_process(groups, batch_size, seed + epoch)
    return _order_for_ranks(groups, batch_size, world_size, seed + epoch)


def _order_for_one_process(groups: list[np.ndarray], batch_size: int, seed: int) -> np.ndarray:
    """Shuffle each group, fill it up with random repeats, and shuffle the batches."""
    rng = np.random.RandomState(seed % 2**32)
    filled_groups = []
    for group in groups:
        missing = round_up(len(group), batch_size) - len(group)
        shuffled = group.copy()
        rng.shuffle(shuffled)
        repeats = rng.choice(shuffled, missing)
        filled_groups += [shuffled, repeats]
    batches = np.concatenate(filled_groups).reshape(-1, batch_size)
    return batches[rng.permutation(len(batches))].reshape(-1)


def _order_for_ranks(
    groups: list[np.ndarray], batch_size: int, world_size: int, seed: int
) -> np.ndarray:
    """Shuffle each group, fill it up from its beginning, and shuffle the batches."""
    rng = torch.Generator().manual_seed(seed)
    filled_groups = []
    for group in groups:
        permutation = torch.randperm(len(group), generator=rng).numpy()
        filled_length = round_up(len(group), batch_size * world_size)
        filled_groups.append(np.resize(group[permutation], filled_length))
    batches = np.concatenate(filled_groups).reshape(-1, batch_size)
    permutation = torch.randperm(len(batches), generator=rng).numpy()
    return batches[permutation].reshape(-1)


class TrainingOrder(Sampler):
    """This rank's batches of (epoch, position, record) from iteration `start` to `end`.

    One pass over it is a whole run, so workers never restart between epochs.
    """

    def __init__(
        self, records: CocoIndex, recipe: Recipe, ranks: Ranks, seed: int, start: int, end: int
    ):
        if not len(records):
            raise UserError(
                "no image of the training set has an annotation and sides of "
                f"{SMALLEST_IMAGE_SIDE} pixels; check --data_path"
            )
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
        order = []
        order_epoch = -1
        first_batch_of_rank = self.ranks.rank * self.steps_per_epoch
        for iteration in range(self.start, self.end):
            epoch = iteration // self.steps_per_epoch
            if epoch != order_epoch:
                positions = epoch_order(
                    self.epoch_records.groups,
                    self.batch_size,
                    self.ranks.world_size,
                    self.seed,
                    epoch,
                )
                order = self.epoch_records.of_epoch(self.seed, epoch)[positions].tolist()
                order_epoch = epoch
            batch = first_batch_of_rank + iteration % self.steps_per_epoch
            first = batch * self.batch_size
            positions = range(first, first + self.batch_size)
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
