"""COCO records to uint8 images and padded boxes: what the workers of the loader do.

A worker decodes an image, resizes it and flips it, and lays the images of a batch on canvases of
the same size. It draws every number of a sample's augmentation from (seed, epoch, position in the
epoch), so that neither the number of workers nor a resumed run changes a sample. Normalisation and
padding follow on the device (augment.py).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
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
from common.npu.device import compiles_each_shape, many_shapes, memory_format
from common.npu.distributed import Ranks
from common.npu.loading import loader_options
from common.npu.operators import constant
from fcos.config import Recipe

CANVAS_MULTIPLE = 32  # pixels; the sides of a canvas are multiples of it
# The original trains neither on images nor on boxes with a shorter side, in pixels.
SMALLEST_IMAGE_SIDE = 32
SMALLEST_BOX_SIDE = 1
# Whether a square image, and one turned by 180 degrees, is turned by its EXIF orientation: the
# original reads with OpenCV, which does.
TURNS_IF_BOTH_FIT = True


class Batch(NamedTuple):
    """N samples. Boxes are padded to M rows, of which `valid` marks the real ones."""

    images: Tensor  # (N, H, W, 3) uint8 RGB, 0 outside of `resized_sizes`
    resized_sizes: Tensor  # (N, 2) int64 height and width of each image on its canvas
    boxes: Tensor  # (N, M, 4) float32 xyxy, pixels of the canvas
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    image_ids: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device, asynchronously from pinned memory; the ids stay on the host."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            resized_sizes=self.resized_sizes.to(device, non_blocking=True),
            boxes=self.boxes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            image_ids=self.image_ids,
        )


class Sample(NamedTuple):
    """One augmented image with its ground truth."""

    image: Tensor  # (H, W, 3) uint8 RGB
    boxes: np.ndarray  # (n, 4) float32 xyxy, pixels
    labels: np.ndarray  # (n,) int64 0-based classes
    image_id: int


class EvaluationSample(NamedTuple):
    """One image on its canvas. The loader makes a batch of the same fields."""

    canvas: Tensor  # (H, W, 3) uint8 RGB
    resized_size: Tensor  # (2,) int64 height and width of the image on the canvas
    original_size: Tensor  # (2,) int64 height and width of the image as it is read, maybe turned
    image_id: Tensor  # () int64


class GroundTruth(NamedTuple):
    """The boxes of I images; image i has the rows from offsets[i] up to offsets[i + 1]."""

    boxes: np.ndarray  # (B, 4) float32 xyxy, pixels of the original images
    labels: np.ndarray  # (B,) int64 0-based classes
    offsets: np.ndarray  # (I + 1,) int64


def training_records(index: CocoIndex) -> CocoIndex:
    """Return the images that are trained on.

    They have at least one annotation, which may be a crowd, and no side below
    `SMALLEST_IMAGE_SIDE`.
    """
    is_annotated = np.diff(index.offsets) > 0
    return index.subset(is_annotated & ~small_images(index))


def resized_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (height, width) of the same aspect ratio that fits the scale.

    `scale` is the largest (short side, long side) in pixels.
    """
    max_short, max_long = scale
    factor = min(max_long / max(height, width), max_short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize(image: np.ndarray, size: tuple[int, int], flip: bool = False) -> Tensor:
    """Resize an image (H, W, 3) uint8 to `size` (height, width), and flip it if asked for.

    The filter is bilinear without antialias, equal to OpenCV's but for one grey level.
    """
    # The batch axis comes first, so that torch sees the layout "channels last", in which it resizes
    # twice as fast.
    planes = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    if flip:
        planes = planes.flip(3)
    resized = F.interpolate(planes, size, mode="bilinear")
    return resized.squeeze(0).permute(1, 2, 0)


def canvas_size(
    resized_sizes: list[tuple[int, int]], shapes: str, scales: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """Return the (height, width) of the canvas for images resized to these (height, width).

    All images must have the same orientation. `shapes` says how a canvas is chosen:

    - "exact": the largest height and the largest width, rounded up to multiples of 32;
    - "two": the smallest that holds all images, among the full sizes of the `scales` (short side,
      long side), in landscape or portrait format;
    - "square": the longest side of all scales in both directions.
    """
    height = round_up(max(size[0] for size in resized_sizes), CANVAS_MULTIPLE)
    width = round_up(max(size[1] for size in resized_sizes), CANVAS_MULTIPLE)
    if shapes == "exact":
        return height, width
    longest = round_up(max(long for _, long in scales), CANVAS_MULTIPLE)
    if shapes == "square":
        return longest, longest
    # Resized landscape images may be square, by rounding, but not all images of a batch.
    is_landscape = any(size[1] > size[0] for size in resized_sizes)
    for short, long in sorted(scales):
        full_height = round_up(short, CANVAS_MULTIPLE)
        full_width = round_up(long, CANVAS_MULTIPLE)
        if not is_landscape:
            full_height, full_width = full_width, full_height
        if height <= full_height and width <= full_width:
            return full_height, full_width
    return longest, longest


def lay_on_canvas(image: Tensor, canvas: Tensor) -> None:
    """Copy an image (h, w, 3) to the top left corner of an empty canvas (H, W, 3)."""
    height, width = image.shape[:2]
    canvas[:height, :width] = image


def normalise(images: Tensor, resized_sizes: Tensor, recipe: Recipe) -> Tensor:
    """Return the network input (N, 3, H, W) float32 of canvases (N, H, W, 3) uint8 RGB.

    It is BGR minus the mean, 0 outside of the images, whose (height, width) are `resized_sizes`
    (N, 2), and in the memory layout that suits the device.
    """
    device = images.device
    bgr = images.float().flip(-1)
    planes = bgr.sub_(constant(recipe.mean, device)).permute(0, 3, 1, 2)
    height = resized_sizes[:, 0].view(-1, 1, 1, 1)
    width = resized_sizes[:, 1].view(-1, 1, 1, 1)
    row = torch.arange(planes.shape[2], device=device).view(-1, 1)
    column = torch.arange(planes.shape[3], device=device)
    planes.masked_fill_((row >= height) | (column >= width), 0)
    return planes.contiguous(memory_format=memory_format(device))


def evaluation_recipe(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with `eval_shapes` set to one of the canvases instead of "auto".

    Two shapes are for devices that compile their kernels for each new shape, exact ones for others.
    """
    if recipe.eval_shapes != "auto":
        return recipe
    shapes = "two" if compiles_each_shape(device) else "exact"
    return replace(recipe, eval_shapes=shapes)


def kernel_choice(shapes: str) -> AbstractContextManager[None]:
    """Return how the device chooses its kernels while it computes on canvases of `canvas_size`.

    There are too many exact ones to try the kernels out on each of them.
    """
    if shapes == "exact":
        return many_shapes()
    return nullcontext()


def input_size(recipe: Recipe) -> str:
    """Return the scale of evaluation and its canvas in words, for the log."""
    short, long = recipe.eval_scale
    return (
        f"images are resized to sides of at most {short} and {long} pixels (--img_scale), canvas "
        f"{recipe.eval_shapes}"
    )


def evaluation_canvas_size(size: tuple[int, int], recipe: Recipe) -> tuple[int, int]:
    """Return the (height, width) of the canvas for an image resized to `size`.

    It depends on no other image, so an image has the same input in every batch. The recipe must be
    one of `evaluation_recipe`: "auto" says nothing without the device.
    """
    if recipe.eval_shapes == "auto":
        raise ValueError('eval_shapes is "auto": take the recipe from evaluation_recipe')
    return canvas_size([size], recipe.eval_shapes, (recipe.eval_scale,))


def evaluation_canvas(image: np.ndarray, recipe: Recipe) -> tuple[Tensor, tuple[int, int]]:
    """Resize an image (H, W, 3) uint8 RGB for evaluation.

    Return its canvas (H, W, 3) uint8, and its (height, width) on it.
    """
    height, width = image.shape[:2]
    size = resized_size(height, width, recipe.eval_scale)
    canvas_height, canvas_width = evaluation_canvas_size(size, recipe)
    canvas = torch.zeros(canvas_height, canvas_width, 3, dtype=torch.uint8)
    lay_on_canvas(resize(image, size), canvas)
    return canvas, size


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """Return the evaluation input (3, H, W) float32 of an image (H, W, 3) uint8 RGB."""
    canvas, size = evaluation_canvas(image, recipe)
    return normalise(canvas.unsqueeze(0), torch.tensor([size]), recipe).squeeze(0)


def small_images(index: CocoIndex) -> np.ndarray:
    """Return which images (I,) have a side below `SMALLEST_IMAGE_SIDE`."""
    return index.sizes.min(axis=1) < SMALLEST_IMAGE_SIDE


def untrained_boxes(index: CocoIndex) -> dict[str, np.ndarray]:
    """Return, by reason, which boxes (A,) of an index are not trained on."""
    table = index.table
    side = table.box_xywh[:, 2:].min(axis=1)
    of_small_image = np.repeat(small_images(index), np.diff(index.offsets))
    return {
        f"in an image with a side below {SMALLEST_IMAGE_SIDE} pixels": of_small_image,
        "iscrowd": table.crowd,
        "ignore": table.ignore,
        f"with a side below {SMALLEST_BOX_SIDE} pixel": side < SMALLEST_BOX_SIDE,
    }


def training_ground_truth(records: CocoIndex) -> GroundTruth:
    """Return the boxes that are trained on, all but `untrained_boxes`."""
    table = records.table
    used = np.ones(len(table), dtype=bool)
    for is_untrained in untrained_boxes(records).values():
        used &= ~is_untrained

    x, y, width, height = table.box_xywh.T
    boxes = np.stack([x, y, x + width, y + height], axis=1).astype(np.float32)
    used_before = np.append(0, np.cumsum(used))  # number of used rows before each row
    return GroundTruth(boxes[used], table.label[used], used_before[records.offsets])


def scale_boxes(
    boxes_xyxy: np.ndarray, old_size: tuple[int, int], new_size: tuple[int, int]
) -> np.ndarray:
    """Move boxes (n, 4) float32 from an image of `old_size` to its resized form, and clip them.

    Sizes are (height, width) in pixels.
    """
    old_height, old_width = old_size
    height, width = new_size
    factor_x = width / old_width
    factor_y = height / old_height
    factors = np.float32([factor_x, factor_y, factor_x, factor_y])
    return (boxes_xyxy * factors).clip(0, np.float32([width, height, width, height]))


def flip_boxes(boxes_xyxy: np.ndarray, width: int) -> np.ndarray:
    """Return the boxes (n, 4) in an image of this width after it is flipped."""
    left, top, right, bottom = boxes_xyxy.T
    return np.stack([width - right, top, width - left, bottom], axis=1)


class TrainingSet(Dataset):
    """`dataset[epoch, position, record]` is a Sample; `collate` makes a Batch of several."""

    def __init__(self, records: CocoIndex, recipe: Recipe, seed: int):
        self.records = records
        self.recipe = recipe
        self.seed = seed
        self.reader = ImageReader(records, TURNS_IF_BOTH_FIT)
        self.max_boxes = records.max_boxes()
        self.all_boxes = training_ground_truth(records)

    def __len__(self) -> int:
        return len(self.records)

    def ground_truth(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (n, 4) float32 xyxy in pixels of the original image, and labels (n,)."""
        boxes, labels, offsets = self.all_boxes
        rows = slice(offsets[record], offsets[record + 1])
        return boxes[rows], labels[rows]

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        epoch, position, record = key
        recipe = self.recipe
        image = self.reader.read(record)
        boxes, labels = self.ground_truth(record)
        scale = recipe.eval_scale
        flip = False
        if recipe.augment:
            rng = np.random.default_rng((self.seed, epoch, position))
            flip = rng.random() < recipe.flip_probability
            scale = recipe.scales[rng.integers(len(recipe.scales))]

        old_height, old_width = image.shape[:2]
        height, width = resized_size(old_height, old_width, scale)
        image = resize(image, (height, width), flip)
        boxes = scale_boxes(boxes, (old_height, old_width), (height, width))
        if flip:
            boxes = flip_boxes(boxes, width)
        return Sample(image, boxes, labels, int(self.records.image_ids[record]))

    def collate(self, samples: list[Sample]) -> Batch:
        """Lay samples of the same orientation on canvases of the same size."""
        resized_sizes = []
        for sample in samples:
            height, width = sample.image.shape[:2]
            resized_sizes.append((height, width))
        count = len(samples)
        height, width = canvas_size(resized_sizes, self.recipe.shapes, self.recipe.scales)
        images = torch.zeros(count, height, width, 3, dtype=torch.uint8)
        boxes = torch.zeros(count, self.max_boxes, 4)
        labels = torch.zeros(count, self.max_boxes, dtype=torch.int64)
        valid = torch.zeros(count, self.max_boxes, dtype=torch.bool)
        for i, sample in enumerate(samples):
            lay_on_canvas(sample.image, images[i])
            num_boxes = len(sample.boxes)
            boxes[i, :num_boxes] = torch.from_numpy(sample.boxes)
            labels[i, :num_boxes] = torch.from_numpy(sample.labels)
            valid[i, :num_boxes] = True
        image_ids = torch.tensor([sample.image_id for sample in samples])
        return Batch(images, torch.tensor(resized_sizes), boxes, labels, valid, image_ids)


def orientation_groups(records: CocoIndex) -> list[np.ndarray]:
    """Return the records of upright (or square) and of landscape images.

    A batch holds images of one group, so that they fit a small canvas. A group without images is
    left out.
    """
    is_landscape = records.sizes[:, 1] > records.sizes[:, 0]
    groups = [np.flatnonzero(~is_landscape), np.flatnonzero(is_landscape)]
    return [group for group in groups if len(group)]


def epoch_records(records: CocoIndex, recipe: Recipe) -> EpochRecords:
    """Return which records an epoch has."""
    factors = repeat_factors(records, recipe.balance)
    return EpochRecords(orientation_groups(records), recipe.repeat, factors)


def iterations_per_epoch(records: CocoIndex, recipe: Recipe, world_size: int) -> int:
    """Return the steps of an epoch, in which each group fills whole batches on all ranks."""
    global_batch = recipe.batch_size * world_size
    groups = epoch_records(records, recipe).groups
    return sum(ceil_div(len(group), global_batch) for group in groups)


def epoch_order(
    groups: list[np.ndarray], batch_size: int, world_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Return the positions of an epoch in shuffled order, batches of one group each.

    Rank r takes the r-th of `world_size` equal sections. Each group is shuffled and filled up from
    its own beginning to whole batches on all ranks; then the batches of all are shuffled. The seed
    is `seed + epoch`. Source: MMDetection's DistributedGroupSampler.
    """
    rng = torch.Generator().manual_seed(seed + epoch)
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
    """`dataset[record]` is an EvaluationSample."""

    def __init__(self, records: CocoIndex, recipe: Recipe):
        self.records = records
        self.recipe = recipe
        self.reader = ImageReader(records, TURNS_IF_BOTH_FIT)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> EvaluationSample:
        image = self.reader.read(record)
        canvas, size = evaluation_canvas(image, self.recipe)
        return EvaluationSample(
            canvas=canvas,
            resized_size=torch.tensor(size),
            original_size=torch.tensor(image.shape[:2]),
            image_id=torch.tensor(self.records.image_ids[record]),
        )


def evaluation_batches(records: CocoIndex, recipe: Recipe) -> list[list[int]]:
    """Return all records in batches of at most `eval_batch_size` with the same canvas size."""
    records_by_canvas: dict[tuple[int, int], list[int]] = {}
    for record, (height, width) in enumerate(records.sizes.tolist()):
        size = resized_size(height, width, recipe.eval_scale)
        canvas = evaluation_canvas_size(size, recipe)
        records_by_canvas.setdefault(canvas, []).append(record)
    batches = []
    for same_canvas in records_by_canvas.values():
        for first in range(0, len(same_canvas), recipe.eval_batch_size):
            batches.append(same_canvas[first : first + recipe.eval_batch_size])
    return batches


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

    For training it gives a Batch for each iteration from `start` up to `end` (default: the end of
    the run). For evaluation it gives every image of this rank once, in batches of the fields of
    EvaluationSample.
    """
    ranks = ranks or Ranks()
    options = loader_options(workers, pin_memory)
    if not training:
        records_of_rank = records.subset(np.arange(ranks.rank, len(records), ranks.world_size))
        return DataLoader(
            EvaluationSet(records_of_rank, recipe),
            batch_sampler=evaluation_batches(records_of_rank, recipe),
            **options,
        )
    if end is None:
        end = recipe.epochs * iterations_per_epoch(records, recipe, ranks.world_size)
    dataset = TrainingSet(records, recipe, seed)
    return DataLoader(
        dataset,
        batch_sampler=TrainingOrder(records, recipe, ranks, seed, start, end),
        collate_fn=dataset.collate,
        **options,
    )


def largest_sample(recipe: Recipe, records: CocoIndex) -> Batch:
    """Return a training batch of one image, whose tensors are as large as those of any other.

    The image lies on the largest canvas that a batch can have.
    """
    loader = build_loader(replace(recipe, batch_size=1), records, training=True, end=1)
    batch = next(iter(loader))
    scales = recipe.scales if recipe.augment else (recipe.eval_scale,)
    largest_size = (max(short for short, _ in scales), max(long for _, long in scales))
    height, width = canvas_size([largest_size], recipe.shapes, recipe.scales)
    image = batch.images[0]
    if image.shape[0] > image.shape[1]:
        height, width = width, height
    canvas = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    lay_on_canvas(image, canvas[0])
    return batch._replace(images=canvas)
