"""Geometry of one image and its boxes on the host: expansion, crop and resizing of uint8 images.

Boxes are xyxy in pixels. Random numbers come from the caller's generator, in the original's order.
"""

import math

import numpy as np
import torch

from ssd_mmdet.config import Recipe


def canvas_around(
    width: int, height: int, recipe: Recipe, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """The canvas an image is put on: its width and height, and the image's left and top in it."""
    if rng.uniform(0, 1) > recipe.expand_probability:
        return width, height, 0, 0
    ratio = rng.uniform(*recipe.expand_ratio)
    left = int(rng.uniform(0, width * ratio - width))
    top = int(rng.uniform(0, height * ratio - height))
    return int(width * ratio), int(height * ratio), left, top


def crop_window(
    width: int, height: int, boxes_xyxy: np.ndarray, recipe: Recipe, rng: np.random.Generator
) -> np.ndarray | None:
    """A random crop: window (4,) int xyxy in pixels, or None for the whole image.

    Every box (n, 4), crowds among them, must have at least the drawn IoU with the window, and one
    centre must lie inside; after `crop_trials` windows that fail the limit is drawn anew.
    """
    size, trials = np.array([width, height]), recipe.crop_trials
    # A box has at most its own area in common with a window, and no window is smaller than this.
    least = (recipe.crop_scale * size - 1).clip(0).prod()
    areas = (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    smallest = areas.min(initial=np.inf)
    while True:
        limit = recipe.crop_ious[rng.integers(len(recipe.crop_ious))]
        if limit == 1:
            return None
        if smallest < limit * least:
            continue
        sides = size * rng.uniform(recipe.crop_scale, 1, (trials, 2))
        # From 1 to what is left, as the original calls numpy: a crop hardly begins at 0.
        start = 1 + (size - sides - 1) * rng.random((trials, 2))
        ratio = sides[:, 1] / sides[:, 0]
        shaped = (recipe.crop_ratio[0] <= ratio) & (ratio <= recipe.crop_ratio[1])
        windows = np.concatenate([start, start + sides], axis=1)[shaped].astype(int)
        fits = _fits(windows, boxes_xyxy, limit)
        if fits.any():
            return windows[fits.argmax()]


def _fits(windows: np.ndarray, boxes_xyxy: np.ndarray, limit: float) -> np.ndarray:
    """Which windows (k, 4) have an area, IoUs from `limit` on and a centre inside."""
    # By coordinate: numpy is slow at many short rows.
    left, top, right, bottom = windows.T[:, :, None]
    x1, y1, x2, y2 = boxes_xyxy.T
    fits = ((left < right) & (top < bottom))[:, 0]
    if len(boxes_xyxy):
        shared_x = np.minimum(right, x2) - np.maximum(left, x1)
        shared_y = np.minimum(bottom, y2) - np.maximum(top, y1)
        overlap = np.maximum(shared_x, 0) * np.maximum(shared_y, 0)
        union = (x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - overlap
        fits &= (overlap >= limit * union).all(axis=1)
        fits &= centers_inside(windows, boxes_xyxy).any(axis=1)
    return fits


def centers_inside(windows_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """Whether the centres of boxes (n, 4) lie strictly inside windows (..., 4): (..., n) bool."""
    left, top, right, bottom = np.moveaxis(windows_xyxy, -1, 0)[..., None]
    x1, y1, x2, y2 = boxes_xyxy.T
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return (left < x) & (x < right) & (top < y) & (y < bottom)


def cut(
    image: np.ndarray, left: int, top: int, width: int, height: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a window of a canvas shows, resized: (size, size, 3) uint8, black outside the image,
    and its cover (2, size).

    The image's corner is at (left, top) of the window of `width` x `height`. Only the part of the
    result that shows the image is computed: no canvas is ever filled.
    """
    image_height, image_width = image.shape[:2]
    columns = slice(max(left, 0), min(left + image_width, width))
    rows = slice(max(top, 0), min(top + image_height, height))
    cover = np.stack([_cover(columns, width, size), _cover(rows, height, size)])
    if columns.start >= columns.stop or rows.start >= rows.stop:
        return np.zeros((size, size, 3), np.uint8), 0 * cover
    shown = image[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    if shown.shape[:2] == (height, width):
        return resize(shown, size, size), cover
    x, first_x, last_x, before_x, after_x = _span(columns, width, size)
    y, first_y, last_y, before_y, after_y = _span(rows, height, size)
    padded = np.zeros(
        (len(shown) + before_y + after_y, shown.shape[1] + before_x + after_x, 3), np.uint8
    )
    padded[before_y:, before_x:][: len(shown), : shown.shape[1]] = shown
    part = resize(padded, last_y - y, last_x - x, (size / height, size / width))
    made = np.zeros((size, size, 3), np.uint8)
    made[first_y:last_y, first_x:last_x] = part[first_y - y :, first_x - x :]
    return made, cover


def _span(place: slice, length: int, size: int) -> tuple[int, int, int, int, int]:
    """Where on an axis the image at `place` of `length` comes to lie in `size`.

    Returns the pixel of the result to compute from, which begins at a whole pixel of the source
    (to 1/64), the first that shows image, the one after the last, and the black pixels that the
    source needs before and after the image.
    """
    scale = length / size
    first = max(0, math.floor((place.start - 0.5) / scale - 0.5) + 1)
    last = min(size, math.ceil((place.stop + 0.5) / scale - 0.5))
    origins = np.arange(first + 1)
    starts = origins * scale
    whole = np.abs(starts - starts.round()) <= 1 / 64
    # What lies before the origin is not blended in: right at the canvas' edge, else not wanted.
    apart = (starts <= place.start) & ((first + 0.5 - origins) * scale >= 0.5)
    origin = int(np.flatnonzero(whole & apart | (origins == 0))[-1])
    before = place.start - round(origin * scale)
    after = int(place.stop < length)
    if after and before + place.stop - place.start + after == last - origin:
        after = 2  # torch does not resize an axis that keeps its length, whatever the scale
    return origin, first, last, before, after


def _cover(place: slice, length: int, size: int) -> np.ndarray:
    """Part of image in each of `size` columns (or rows), by the weights of bilinear resizing."""
    if place == slice(0, length):
        return np.ones(size, np.float32)
    center = ((np.arange(size) + 0.5) * (length / size) - 0.5).clip(0, length - 1)
    part = np.minimum(center - place.start + 1, place.stop - center)
    return part.clip(0, 1).astype(np.float32)


def resize(
    image: np.ndarray, height: int, width: int, scales: tuple[float, float] | None = None
) -> np.ndarray:
    """Image (H, W, 3) uint8 to (height, width, 3): bilinear without antialias, OpenCV's to a
    level. With `scales` a pixel of the image becomes so many, else height / H and width / W."""
    # Batch axis first: only so the strides are those of channels last, which is 4 times as fast.
    nhwc = torch.from_numpy(np.ascontiguousarray(image)).unsqueeze(0).permute(0, 3, 1, 2)
    # Not F.interpolate: that takes a size or scales, not both.
    bilinear = torch.ops.aten.upsample_bilinear2d.default
    made = bilinear(nhwc, [height, width], False, *(scales or (None, None)))
    return made.permute(0, 2, 3, 1)[0].numpy()


def resize_as_opencv(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Image (H, W, 3) uint8 to (height, width, 3) as OpenCV's INTER_LINEAR gives it, to the last
    level; several times slower than `resize`.

    OpenCV computes in whole numbers: weights have 11 bits, 4 bits are dropped after the columns,
    16 after the product with each row's weight, and the last 2 are rounded off.
    """
    (top, bottom), row_weights = _taps(image.shape[0], height)
    columns, column_weights = _taps(image.shape[1], width)
    rows, place = np.unique([top, bottom], return_inverse=True)
    needed = image[rows]
    blended = np.zeros((len(rows), width, 3), np.int32)
    for column, weight in zip(columns, column_weights, strict=True):
        part = needed.take(column, axis=1).astype(np.int32)
        part *= weight[:, None]
        blended += part
    blended >>= 4
    made = np.full((height, width, 3), 2, np.int32)
    for row, weight in zip(place.reshape(2, -1), row_weights, strict=True):
        part = blended[row]
        part *= weight[:, None, None]
        part >>= 16
        made += part
    return (made >> 2).astype(np.uint8)


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The two source pixels of each of `size` results and their weights times 2048: (2, size)."""
    center = (np.arange(size) + 0.5) * (length / size) - 0.5
    center = center.clip(0, length - 1).astype(np.float32)  # as OpenCV: it decides some roundings
    first = np.floor(center).astype(np.int64)
    second = np.minimum(first + 1, length - 1)
    weight = np.round((center - first) * 2048).astype(np.int32)
    return np.stack([first, second]), np.stack([2048 - weight, weight])
