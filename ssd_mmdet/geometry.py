"""Geometry of one image and its boxes on the host: expansion, crop and resizing of uint8 images.

Boxes are xyxy in pixels. Random numbers come from the caller's generator, in the original's order.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch

from common.coco.images import EncodedImage
from ssd_mmdet.config import Recipe

Box = Sequence[float]  # left, top, right, bottom


def canvas_around(
    width: int, height: int, recipe: Recipe, rng: random.Random
) -> tuple[int, int, int, int]:
    """The canvas an image is put on: its width and height, and the image's left and top in it."""
    if rng.uniform(0, 1) > recipe.expand_probability:
        return width, height, 0, 0
    ratio = rng.uniform(*recipe.expand_ratio)
    left = int(rng.uniform(0, width * ratio - width))
    top = int(rng.uniform(0, height * ratio - height))
    return int(width * ratio), int(height * ratio), left, top


def crop_window(
    width: int, height: int, boxes: list[Box], recipe: Recipe, rng: random.Random
) -> tuple[int, int, int, int] | None:
    """A random crop: window (left, top, right, bottom) in pixels, or None for the whole image.

    Every box, crowds among them, must have at least the drawn IoU with the window, and one centre
    must lie inside; after `crop_trials` windows that fail the limit is drawn anew.
    """
    narrowest, lowest = recipe.crop_scale * width, recipe.crop_scale * height
    least = max(narrowest - 1, 0) * max(lowest - 1, 0)  # area of the smallest window
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]
    smallest, largest = min(areas, default=math.inf), max(areas, default=0)
    while True:
        limit = rng.choice(recipe.crop_ious)
        if limit == 1:
            return None
        # A box has at most its own area in common with a window, a window its own with a box.
        if smallest < limit * max(least, limit * largest):
            continue
        for _ in range(recipe.crop_trials):
            across, down = rng.uniform(narrowest, width), rng.uniform(lowest, height)
            if not recipe.crop_ratio[0] <= down / across <= recipe.crop_ratio[1]:
                continue
            # From 1 to what is left, as the original calls numpy: a crop hardly begins at 0.
            left, top = rng.uniform(width - across, 1), rng.uniform(height - down, 1)
            window = int(left), int(top), int(left + across), int(top + down)
            if _fits(window, boxes, limit):
                return window


def _fits(window: Box, boxes: list[Box], limit: float) -> bool:
    """Whether a window has an area, IoUs from `limit` on and a centre inside."""
    left, top, right, bottom = window
    if left >= right or top >= bottom:
        return False
    for x1, y1, x2, y2 in boxes:
        shared_x, shared_y = min(right, x2) - max(left, x1), min(bottom, y2) - max(top, y1)
        overlap = max(shared_x, 0) * max(shared_y, 0)
        union = (x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - overlap
        if overlap < limit * union:
            return False
    return not boxes or any(center_inside(window, box) for box in boxes)


def center_inside(window: Box, box: Box) -> bool:
    """Whether the box's centre lies strictly inside the window."""
    return (
        window[0] < (box[0] + box[2]) / 2 < window[2]
        and window[1] < (box[1] + box[3]) / 2 < window[3]
    )


def cut(
    image: np.ndarray | EncodedImage, left: int, top: int, width: int, height: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a window of a canvas shows, resized: (size, size, 3) uint8, black outside the image,
    and its place (2, 3) float32, as a Batch has it.

    The image's corner is at (left, top) of the window of `width` x `height`. Only the part of the
    result that shows the image is computed: no canvas is ever filled.
    """
    image_height, image_width = image.shape[:2]
    columns = slice(max(left, 0), min(left + image_width, width))
    rows = slice(max(top, 0), min(top + image_height, height))
    place = np.float32([(columns.start, columns.stop, width), (rows.start, rows.stop, height)])
    if columns.start >= columns.stop or rows.start >= rows.stop:
        return np.zeros((size, size, 3), np.uint8), place * np.float32([0, 0, 1])
    shown = image[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    if shown.shape[:2] == (height, width):
        return resize(shown, size, size), place
    y, first_y, last_y, before_y, after_y = _span(rows, height, size)
    x, first_x, last_x, before_x, after_x = _span(columns, width, size)
    padded = np.zeros(
        (len(shown) + before_y + after_y, shown.shape[1] + before_x + after_x, 3), np.uint8
    )
    padded[before_y:, before_x:][: len(shown), : shown.shape[1]] = shown
    part = resize(padded, last_y - y, last_x - x, (size / height, size / width))
    made = np.zeros((size, size, 3), np.uint8)
    made[first_y:last_y, first_x:last_x] = part[first_y - y :, first_x - x :]
    return made, place


def _span(place: slice, length: int, size: int) -> tuple[int, int, int, int, int]:
    """Where on an axis the image at `place` of `length` comes to lie in `size`.

    Returns the pixel of the result to compute from, which begins at a whole pixel of the source
    (to 1/64), the first that shows image, the one after the last, and the black pixels that the
    source needs before and after the image.
    """
    scale = length / size
    first = max(0, math.floor((place.start - 0.5) / scale - 0.5) + 1)
    last = min(size, math.ceil((place.stop + 0.5) / scale - 0.5))
    for origin in range(first, -1, -1):
        start = origin * scale
        whole = abs(start - round(start)) <= 1 / 64
        # What lies before the origin is not blended in: right at the canvas' edge, else not wanted.
        apart = start <= place.start and (first + 0.5 - origin) * scale >= 0.5
        if whole and apart:
            break
    before = place.start - round(origin * scale)
    after = int(place.stop < length)
    if after and before + place.stop - place.start + after == last - origin:
        after = 2  # torch does not resize an axis that keeps its length, whatever the scale
    return origin, first, last, before, after


def resize(
    image: np.ndarray, height: int, width: int, scales: tuple[float, float] | None = None
) -> np.ndarray:
    """Image (H, W, 3) uint8 to (height, width, 3): bilinear without antialias, OpenCV's to a
    level. With `scales` a pixel of the image becomes so many, else height / H and width / W."""
    # Batch axis first: only so the strides are those of channels last, which is 4 times as fast.
    nhwc = torch.from_numpy(np.ascontiguousarray(image)).unsqueeze(0).permute(0, 3, 1, 2)
    # Not F.interpolate: that takes a size or scales, not both.
    bilinear = torch.ops.aten.upsample_bilinear2d.default
    down, across = scales or (None, None)
    if len(image) > height:  # fewer rows first: the columns' pass costs more, row by row
        nhwc = bilinear(nhwc, [height, image.shape[1]], False, down, None)
    made = bilinear(nhwc, [height, width], False, down, across)
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
