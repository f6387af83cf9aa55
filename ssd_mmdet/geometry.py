"""Geometry of one image and its boxes on the host: expansion, crop and resizing of uint8 images.

All coordinates are xyxy in pixels of the image. Random numbers come from the caller's generator, in
the order in which the original draws them.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ssd_mmdet.config import NO_CROP, Recipe

Box = Sequence[float]  # left, top, right, bottom
# A cut-out begins at a whole pixel up to this error, in pixels; it shifts the picture unnoticeably.
ALIGNMENT_TOLERANCE = 1 / 64


class Window(NamedTuple):
    """A rectangle of whole pixels, which may reach beyond the image."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def has_center_of(self, box: Box) -> bool:
        """Return whether the centre of the box lies strictly inside the window."""
        center_x = (box[0] + box[2]) / 2
        center_y = (box[1] + box[3]) / 2
        return self.left < center_x < self.right and self.top < center_y < self.bottom


def canvas_around(width: int, height: int, recipe: Recipe, rng: random.Random) -> Window:
    """Draw the canvas on which an image of this size is put: the image itself or a larger window.

    Source: SSD paper, section 3.6 ("zoom out").
    """
    if rng.uniform(0, 1) > recipe.expand_probability:
        return Window(0, 0, width, height)
    ratio = rng.uniform(*recipe.expand_ratio)
    image_left = int(rng.uniform(0, width * ratio - width))
    image_top = int(rng.uniform(0, height * ratio - height))
    return Window(
        left=-image_left,
        top=-image_top,
        right=int(width * ratio) - image_left,
        bottom=int(height * ratio) - image_top,
    )


def crop_window(
    canvas: Window, boxes: list[Box], recipe: Recipe, rng: random.Random
) -> Window | None:
    """Draw the window of a random crop of the canvas, or None for no crop.

    All `boxes`, crowds included, must have at least the drawn IoU with the window, and the centre
    of one of them must lie inside. After `crop_trials` windows that fail another IoU is drawn.
    Source: SSD paper, section 2.2, in the form of MMDetection's MinIoURandomCrop.
    """
    min_width = recipe.crop_scale * canvas.width
    min_height = recipe.crop_scale * canvas.height
    while True:
        min_iou = rng.choice(recipe.crop_ious)
        if min_iou == NO_CROP:
            return None
        # Most of the time goes into windows that cannot succeed, so these are not even drawn.
        if not _iou_can_be_reached(min_iou, boxes, min_width, min_height):
            continue
        for _ in range(recipe.crop_trials):
            window = _random_window(canvas, min_width, min_height, recipe, rng)
            if window is not None and _is_acceptable(window, boxes, min_iou):
                return window


def _iou_can_be_reached(
    min_iou: float, boxes: list[Box], min_width: float, min_height: float
) -> bool:
    """Return whether a window can have at least this IoU with every box.

    An overlap is at most the area of the smaller of box and window, a union at least that of the
    larger. So the window's area is at least `min_iou` times the largest box's, and the smallest
    box's area is at least `min_iou` times the window's.
    """
    if not boxes:
        return True
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    # Rounding to whole pixels can make the window's sides up to a pixel shorter.
    min_window_area = max(min_width - 1, 0) * max(min_height - 1, 0)
    min_window_area = max(min_window_area, min_iou * max(areas))
    return min(areas) >= min_iou * min_window_area


def _random_window(
    canvas: Window, min_width: float, min_height: float, recipe: Recipe, rng: random.Random
) -> Window | None:
    """Draw a window inside the canvas; None if its ratio of height to width is out of range."""
    width = rng.uniform(min_width, canvas.width)
    height = rng.uniform(min_height, canvas.height)
    lowest_ratio, highest_ratio = recipe.crop_ratio
    if not lowest_ratio <= height / width <= highest_ratio:
        return None
    # The original calls numpy's uniform(limit), which draws between `limit` and 1. So a window
    # hardly ever begins at 0.
    left = rng.uniform(canvas.width - width, 1)
    top = rng.uniform(canvas.height - height, 1)
    return Window(
        left=canvas.left + int(left),
        top=canvas.top + int(top),
        right=canvas.left + int(left + width),
        bottom=canvas.top + int(top + height),
    )


def _is_acceptable(window: Window, boxes: list[Box], min_iou: float) -> bool:
    """Return whether a window has an area, the IoU with every box, and the centre of one."""
    if window.width <= 0 or window.height <= 0:
        return False
    if not boxes:
        return True
    for box in boxes:
        if not _iou_is_at_least(min_iou, window, box):
            return False
    return any(window.has_center_of(box) for box in boxes)


def _iou_is_at_least(min_iou: float, window: Window, box: Box) -> bool:
    left, top, right, bottom = box
    overlap_width = min(window.right, right) - max(window.left, left)
    overlap_height = min(window.bottom, bottom) - max(window.top, top)
    overlap = max(overlap_width, 0) * max(overlap_height, 0)
    union = (right - left) * (bottom - top) + window.width * window.height - overlap
    return overlap >= min_iou * union


def cut_and_resize(
    image: np.ndarray, window: Window, size: int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Return what a window shows, resized to (size, size, 3) uint8, and where the image is in it.

    The result is black outside the image (H, W, 3). The second value is the part of the window that
    the image covers: a box xyxy in pixels of the window, all zeros if the image is not visible.
    Only the visible part is computed: no canvas is ever filled.
    """
    image_height, image_width = image.shape[:2]
    left = max(window.left, 0)
    top = max(window.top, 0)
    right = min(window.right, image_width)
    bottom = min(window.bottom, image_height)
    if left >= right or top >= bottom:
        return np.zeros((size, size, 3), np.uint8), (0, 0, 0, 0)
    visible = image[top:bottom, left:right]
    visible_box = (
        left - window.left,
        top - window.top,
        right - window.left,
        bottom - window.top,
    )
    if visible.shape[:2] == (window.height, window.width):
        return resize(visible, size, size), visible_box

    result = np.zeros((size, size, 3), np.uint8)
    x = _placement_on_axis(visible_box[0], visible_box[2], window.width, size)
    y = _placement_on_axis(visible_box[1], visible_box[3], window.height, size)
    if x.first == x.end or y.first == y.end:  # the image reaches no pixel of the result
        return result, visible_box
    visible_height, visible_width = visible.shape[:2]
    source_height = y.black_before + visible_height + y.black_after
    source_width = x.black_before + visible_width + x.black_after
    source = np.zeros((source_height, source_width, 3), np.uint8)
    source_rows = slice(y.black_before, y.black_before + visible_height)
    source_columns = slice(x.black_before, x.black_before + visible_width)
    source[source_rows, source_columns] = visible
    resized = resize(
        source,
        height=y.end - y.origin,
        width=x.end - x.origin,
        scales=(size / window.height, size / window.width),
    )
    result[y.first : y.end, x.first : x.end] = resized[y.first - y.origin :, x.first - x.origin :]
    return result, visible_box


class AxisPlacement(NamedTuple):
    """How the visible part of an image comes to lie on one axis of the resized window."""

    origin: int  # pixel of the result from which on it is computed
    first: int  # first pixel of the result that shows the image
    end: int  # the pixel after the last one that shows the image
    black_before: int  # black pixels of the source before the image
    black_after: int  # black pixels of the source after the image


def _placement_on_axis(
    image_start: int, image_end: int, window_length: int, size: int
) -> AxisPlacement:
    """Return the placement of an image that covers these pixels of the window's axis.

    Pixel p of the result has its centre at (p + 0.5) * scale - 0.5 in the window and blends the two
    pixels around it, so it shows the image if that centre lies between `image_start` - 1 and
    `image_end`. Where there is no such pixel, `first` is `end`.
    """
    scale = window_length / size
    first = max(0, math.floor((image_start - 0.5) / scale - 0.5) + 1)
    end = min(size, math.ceil((image_end + 0.5) / scale - 0.5))
    origin = _aligned_origin(first, image_start, scale)
    black_before = image_start - round(origin * scale)
    black_after = 1 if image_end < window_length else 0
    source_length = black_before + (image_end - image_start) + black_after
    # torch copies an axis whose length does not change, whatever the scale: make it change.
    if black_after and source_length == end - origin:
        black_after = 2
    return AxisPlacement(origin, first, end, black_before, black_after)


def _aligned_origin(first: int, image_start: int, scale: float) -> int:
    """Return the last pixel of the result, not after `first`, from which resizing can begin.

    It must begin at a whole pixel of the window, at or before the image. Pixel `first` must not
    blend with what lies before the origin, because that is not part of the source. Pixel 0 always
    qualifies: nothing lies before the window.
    """
    for origin in range(first, 0, -1):
        start = origin * scale
        is_whole = abs(start - round(start)) <= ALIGNMENT_TOLERANCE
        is_before_image = start <= image_start
        first_is_inside = (first + 0.5 - origin) * scale >= 0.5
        if is_whole and is_before_image and first_is_inside:
            return origin
    return 0


def resize(
    image: np.ndarray, height: int, width: int, scales: tuple[float, float] | None = None
) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to (height, width, 3): bilinear, without antialias.

    The result differs from OpenCV's INTER_LINEAR by one grey level at most. `scales` are the
    factors from source to result along rows and columns; by default height / H and width / W.
    """
    # The batch axis must come before the permutation: only then does torch recognise the strides as
    # channels last, for which its kernel is 4 times as fast.
    batch = torch.from_numpy(np.ascontiguousarray(image)).unsqueeze(0).permute(0, 3, 1, 2)
    scale_rows = None
    scale_columns = None
    if scales is not None:
        scale_rows, scale_columns = scales
    # F.interpolate takes a size or scales, but not both.
    bilinear = torch.ops.aten.upsample_bilinear2d.default
    if len(image) > height:
        # The pass over columns is the slower one: reduce the number of its rows first.
        batch = bilinear(batch, [height, image.shape[1]], False, scale_rows, None)
    resized = bilinear(batch, [height, width], False, scale_rows, scale_columns)
    return resized.squeeze(0).permute(1, 2, 0).numpy()
