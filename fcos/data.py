"""COCO records to uint8 images and padded boxes: what the loader's workers do.

A worker decodes an image, flips and resizes it onto its batch's canvas; it draws every
number of a sample's augmentation from (seed, epoch, position in the epoch), so that neither the
number of workers nor a resumed run changes a sample. Normalisation and padding follow on the
device (augment.py).
"""

import functools
import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from common.coco.images import read_image
from common.coco.index import CocoIndex
from common.errors import UserError
from common.npu.device import compiles_each_shape, memory_format
from common.npu.distributed import Ranks
from fcos.config import Recipe

STRIDE = 32  # canvases are multiples of it, pixels
SMALLEST = 32  # images with a shorter side are not trained on, pixels


class Batch(NamedTuple):
    """N samples; `boxes` are padded to M rows, `valid` marks the real ones."""

    images: Tensor  # (N, H, W, 3) uint8 RGB; what lies outside of `sizes` means nothing
    sizes: Tensor  # (N, 2) int64 height, width of each image on its canvas
    boxes: Tensor  # (N, M, 4) float32 xyxy, pixels of the canvas
    labels: Tensor  # (N, M) int64 0-based classes
    valid: Tensor  # (N, M) bool
    image_ids: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        """On the device, asynchronously where pinned; the ids stay on the host."""
        moved = (part.to(device, non_blocking=True) for part in self[:-1])
        return Batch(*moved, self.image_ids)


class Sample(NamedTuple):
    """What `TrainingSet.collate` lays out: the image is still to be flipped and resized, so that
    it is written only once at that size, right onto the canvas."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, as decoded
    size: tuple[int, int]  # height, width on the canvas
    flip: bool
    boxes: np.ndarray  # (n, 4) float32 xyxy, pixels of the canvas
    labels: np.ndarray  # (n,)
    image_id: int


def training_records(index: CocoIndex) -> CocoIndex:
    """The images with at least one annotation, crowd included, that are not tiny."""
    return index.subset((np.diff(index.offsets) > 0) & (index.sizes.min(axis=1) >= SMALLEST))


def resized_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The size of an image that keeps its ratio and fits `scale` (short, long side)."""
    short, long = scale
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize(image: np.ndarray, size: tuple[int, int], flip: bool = False) -> Tensor:
    """Image (H, W, 3) uint8 to (*size, 3), flipped if asked: bilinear without antialias, OpenCV's
    to a level."""
    # In this order the strides say "channels last", which torch resizes twice as fast.
    chw = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    if flip:
        chw = chw.flip(3)
    return F.interpolate(chw, size, mode="bilinear").squeeze(0).permute(1, 2, 0)


def resize_onto(canvas: Tensor, image: np.ndarray, size: tuple[int, int], flip=False) -> None:
    """Lay `resize` of an image in the corner of a contiguous canvas (H, W, 3) uint8, 0 around it.

    First the columns, widened to the canvas, then the rows, straight into it: nothing is copied
    at full size.
    """
    height, width = size
    columns = resize(image, (len(image), width), flip)
    columns = F.pad(columns, (0, 0, 0, canvas.shape[1] - width))
    source, target = (x.unsqueeze(0).permute(0, 3, 1, 2) for x in (columns, canvas[:height]))
    torch.ops.aten.upsample_bilinear2d.out(source, target.shape[2:], False, out=target)
    canvas[height:] = 0


def canvas_size(
    sizes: list[tuple[int, int]], shapes: str, scales: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """(height, width) of the canvas for images of these (height, width), all of one orientation.

    `exact`: the largest height and width, rounded up to 32. `two`: of the scales' full sizes,
    lying or standing, the smallest that holds them all. `square`: the longest side both ways.
    """
    height, width = (_round_up(max(side)) for side in zip(*sizes, strict=True))
    if shapes == "exact":
        return height, width
    longest = _round_up(max(max(scale) for scale in scales))
    if shapes == "square":
        return longest, longest
    lying = any(w > h for h, w in sizes)  # a square may lie among them, by rounding
    for short, long in sorted(scales):
        full = (_round_up(short), _round_up(long))
        full = full if lying else full[::-1]
        if height <= full[0] and width <= full[1]:
            return full
    return longest, longest


def _round_up(side: int) -> int:
    return -(-side // STRIDE) * STRIDE


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def normalise(images: Tensor, sizes: Tensor, recipe: Recipe) -> Tensor:
    """Images (N, H, W, 3) RGB in 0..255, of `sizes` (N, 2), to (N, 3, H, W) float32 BGR minus the
    mean, 0 outside of the image, in the device's layout."""
    device = images.device
    planes = images.float().flip(-1).sub_(_constant(recipe.mean, device)).permute(0, 3, 1, 2)
    height, width = (side.view(-1, 1, 1, 1) for side in sizes.unbind(1))
    row = torch.arange(planes.shape[2], device=device).view(-1, 1)
    column = torch.arange(planes.shape[3], device=device)
    planes = torch.where((row < height) & (column < width), planes, 0.0)
    return planes.contiguous(memory_format=memory_format(device))


def evaluation_recipe(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with `eval_shapes` decided: exact, but where every shape is compiled."""
    if recipe.eval_shapes != "auto":
        return recipe
    return replace(recipe, eval_shapes="two" if compiles_each_shape(device) else "exact")


def evaluation_canvas(size: tuple[int, int], recipe: Recipe) -> tuple[int, int]:
    """(height, width) of the canvas of one resized image: it depends on nothing else."""
    shapes = "exact" if recipe.eval_shapes == "auto" else recipe.eval_shapes
    return canvas_size([size], shapes, (recipe.eval_scale,))


def prepare(image: np.ndarray, recipe: Recipe) -> tuple[Tensor, tuple[int, int]]:
    """The evaluation canvas (H, W, 3) uint8 of an image, and its size (height, width) on it."""
    size = resized_size(*image.shape[:2], recipe.eval_scale)
    canvas = torch.empty((*evaluation_canvas(size, recipe), 3), dtype=torch.uint8)
    resize_onto(canvas, image, size)
    return canvas, size


def prepare_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """The evaluation input (3, H, W) float32 of an image (H, W, 3) uint8 RGB."""
    canvas, size = prepare(image, recipe)
    return normalise(canvas.unsqueeze(0), torch.tensor([size]), recipe).squeeze(0)


def read_sized(records: CocoIndex, record: int) -> np.ndarray:
    """The image of a record. Raises UserError where it has another size than the record says."""
    path = records.path(record)
    image = read_image(path)
    if image.shape[:2] != tuple(records.sizes[record]):
        (height, width), found = records.sizes[record], image.shape
        raise UserError(
            f"{path}: is {found[1]} x {found[0]} pixels, {width} x {height} in the annotation "
            "file; correct it, --check_data lists every such file"
        )
    return image


def ground_truth(records: CocoIndex) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All images' boxes (B, 4) float32 xyxy in pixels of the originals, labels (B,), and offsets
    (I + 1,): image i has the rows offsets[i]:offsets[i + 1].

    Crowds, annotations to ignore, and boxes of less than a pixel a side or of no area inside
    the image are left out.
    """
    rows = records.table
    x, y, w, h = rows.box_xywh.T
    height, width = np.repeat(records.sizes, np.diff(records.offsets), axis=0).T
    shared_x = np.minimum(x + w, width) - np.maximum(x, 0)
    shared_y = np.minimum(y + h, height) - np.maximum(y, 0)
    real = (shared_x > 0) & (shared_y > 0) & (w >= 1) & (h >= 1)
    real &= ~(rows.crowd | rows.ignore | (rows.area <= 0))
    boxes = np.stack([x, y, x + w, y + h], axis=1).astype(np.float32)
    offsets = np.append(0, np.cumsum(real))[records.offsets]
    return boxes[real], rows.label[real], offsets


class TrainingSet(Dataset):
    """`dataset[epoch, position, record]` is a Sample, `collate` makes a Batch of several."""

    def __init__(self, records: CocoIndex, recipe: Recipe, seed: int):
        self.records, self.recipe, self.seed = records, recipe, seed
        self.slots = records.max_boxes()
        self.boxes, self.labels, self.offsets = ground_truth(records)

    def __len__(self) -> int:
        return len(self.records)

    def truth(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) float32 xyxy in pixels of the original, labels (n,) of an image."""
        rows = slice(self.offsets[record], self.offsets[record + 1])
        return self.boxes[rows], self.labels[rows]

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        epoch, position, record = key
        recipe = self.recipe
        image = read_sized(self.records, record)
        boxes, labels = self.truth(record)
        scale, flip = recipe.eval_scale, False
        if recipe.augment:
            rng = np.random.default_rng((self.seed, epoch, position))
            flip = rng.random() < recipe.flip_probability
            scale = recipe.scales[rng.integers(len(recipe.scales))]
        size = resized_size(*image.shape[:2], scale)
        boxes = scale_boxes(boxes, image.shape[:2], size)
        if flip:
            boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
        return Sample(image, size, flip, boxes, labels, self.records.image_ids[record])

    def collate(self, samples: list[Sample]) -> Batch:
        """Samples of one orientation on a common canvas."""
        sizes = [sample.size for sample in samples]
        canvas = canvas_size(sizes, self.recipe.shapes, self.recipe.scales)
        count, slots = len(samples), self.slots
        images = _uint8((count, *canvas, 3))
        boxes = np.zeros((count, slots, 4), np.float32)
        labels = np.zeros((count, slots), np.int64)
        valid = np.zeros((count, slots), bool)
        for i, sample in enumerate(samples):
            resize_onto(images[i], sample.image, sample.size, sample.flip)
            n = len(sample.labels)
            boxes[i, :n], labels[i, :n], valid[i, :n] = sample.boxes, sample.labels, True
        truth = map(torch.from_numpy, (boxes, labels, valid))
        image_ids = torch.tensor([sample.image_id for sample in samples])
        return Batch(images, torch.tensor(sizes), *truth, image_ids)


def _uint8(shape: tuple[int, ...]) -> Tensor:
    """A tensor to be filled; in a worker at once in the memory that the main process reads."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's default_collate
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def scale_boxes(boxes_xyxy: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Boxes (n, 4) float32 of an image of size `old` (height, width) on one of size `new`."""
    factor = np.array([new[1] / old[1], new[0] / old[0]] * 2, np.float32)
    return (boxes_xyxy * factor).clip(0, np.array([new[1], new[0]] * 2, np.float32))


def orientation(records: CocoIndex) -> np.ndarray:
    """(I,) int64: 1 for images wider than high, else 0. A batch holds images of one kind."""
    return (records.sizes[:, 1] > records.sizes[:, 0]).astype(np.int64)


def epoch_order(
    groups: np.ndarray, seed: int, epoch: int, batch_size: int, world_size: int
) -> np.ndarray:
    """The positions of an epoch, one batch after the other, rank 0's batches first.

    Seeded by seed + epoch: a permutation of each group, extended from its own beginning to full
    batches on all ranks; then a permutation of all batches.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    multiple = batch_size * world_size
    order = []
    for group in (0, 1):
        members = np.flatnonzero(groups == group)
        if len(members):
            members = members[torch.randperm(len(members), generator=generator).numpy()]
            order.append(np.resize(members, -(-len(members) // multiple) * multiple))
    batches = np.concatenate(order).reshape(-1, batch_size)
    return batches[torch.randperm(len(batches), generator=generator).numpy()].reshape(-1)


def iterations_per_epoch(records: CocoIndex, batch_size: int, world_size: int) -> int:
    """Steps of an epoch: each orientation fills its last batches on all ranks."""
    counts = np.bincount(orientation(records), minlength=2)
    return int(sum(-(-counts // (batch_size * world_size))))


class TrainingOrder(Sampler):
    """This rank's batches of (epoch, position, record), from any iteration to the run's last.

    One pass over it is a whole run: workers never restart between epochs. Of each epoch's order
    rank r takes the r-th contiguous part.
    """

    def __init__(
        self, records: CocoIndex, batch_size: int, ranks: Ranks, seed: int, start: int, end: int
    ):
        if not len(records):
            raise UserError(
                "no image of the training set has an annotation and sides of 32 pixels; "
                "check --data_path"
            )
        self.groups = orientation(records)
        self.batch_size, self.ranks, self.seed = batch_size, ranks, seed
        self.start, self.end = start, end
        self.per_epoch = iterations_per_epoch(records, batch_size, ranks.world_size)

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, order = -1, None
        for iteration in range(self.start, self.end):
            if iteration // self.per_epoch != epoch:
                epoch = iteration // self.per_epoch
                order = epoch_order(
                    self.groups, self.seed, epoch, self.batch_size, self.ranks.world_size
                ).tolist()
            batch = self.ranks.rank * self.per_epoch + iteration % self.per_epoch
            positions = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [(epoch, position, order[position]) for position in positions]


class EvaluationSet(Dataset):
    """Canvas (H, W, 3) uint8, size on it, original (height, width), and image id."""

    def __init__(self, records: CocoIndex, recipe: Recipe):
        self.records, self.recipe = records, recipe

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        canvas, size = prepare(read_sized(self.records, record), self.recipe)
        original = torch.from_numpy(self.records.sizes[record].astype(np.int64))
        image_id = torch.tensor(self.records.image_ids[record])
        return canvas, torch.tensor(size), original, image_id


def evaluation_batches(records: CocoIndex, recipe: Recipe) -> list[list[int]]:
    """Positions of all images, those of one canvas together, at most `eval_batch_size` at once."""
    by_canvas: dict[tuple, list[int]] = {}
    for record, (height, width) in enumerate(records.sizes.tolist()):
        canvas = evaluation_canvas(resized_size(height, width, recipe.eval_scale), recipe)
        by_canvas.setdefault(canvas, []).append(record)
    size = recipe.eval_batch_size
    return [same[i : i + size] for same in by_canvas.values() for i in range(0, len(same), size)]


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
        batches = evaluation_batches(mine, recipe)
        return DataLoader(EvaluationSet(mine, recipe), batch_sampler=batches, **options)
    per_epoch = iterations_per_epoch(records, recipe.batch_size, ranks.world_size)
    end = recipe.epochs * per_epoch if end is None else end
    order = TrainingOrder(records, recipe.batch_size, ranks, seed, start, end)
    dataset = TrainingSet(records, recipe, seed)
    return DataLoader(dataset, batch_sampler=order, collate_fn=dataset.collate, **options)


def quiet_worker(worker: int) -> None:
    """Ctrl-C and a SIGTERM to the whole process group are the main process's to handle: while it
    finishes its step and saves, a worker must not die; it does a minute later at the latest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
