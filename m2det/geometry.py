"""Geometry of a training sample: random crop, expansion and flip, and what they do to boxes.

All coordinates are in pixels of the original image, in `xyxy` order, unless a docstring names
others. Random numbers come from the caller's generator.
"""

from typing import NamedTuple

import numpy as np

from m2det.config import NO_CROP, Recipe


class Window(NamedTuple):
    """The rectangle of whole pixels that is cut out of an image."""

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


class Canvas(NamedTuple):
    """A larger canvas, and where the left upper corner of the picture lies on it, in pixels."""

    width: int
    height: int
    left: int
    top: int


class Geometry(NamedTuple):
    """How an image becomes the network input, in this order."""

    window: Window  # what is cut out
    canvas: Canvas  # on which it is put
    flip: bool  # of the canvas, left to right
    interpolation: str  # of the canvas, to the size of the network input


def keep_whole(width: int, height: int, interpolation: str) -> Geometry:
    """Return the geometry that only resizes an image."""
    window = Window(0, 0, width, height)
    canvas = Canvas(width, height, 0, 0)
    return Geometry(window, canvas, False, interpolation)


def draw_geometry(
    boxes_xyxy: np.ndarray, width: int, height: int, recipe: Recipe, rng: np.random.Generator
) -> Geometry:
    """Draw crop, expansion, flip and interpolation of an image with boxes (n, 4) float64."""
    window = crop_window(boxes_xyxy, width, height, recipe, rng)
    canvas = expanded_canvas(window.width, window.height, recipe, rng)
    flip = bool(rng.random() < recipe.flip_probability)
    interpolation = draw_interpolation(recipe, rng)
    return Geometry(window, canvas, flip, interpolation)


def draw_interpolation(recipe: Recipe, rng: np.random.Generator) -> str:
    """Draw one of the recipe's interpolations."""
    return recipe.interpolations[rng.integers(len(recipe.interpolations))]


def crop_window(
    boxes_xyxy: np.ndarray, width: int, height: int, recipe: Recipe, rng: np.random.Generator
) -> Window:
    """Draw the window of a random crop, which may be the whole image.

    All boxes (n, 4) float64, at least one, must have at least the drawn IoU with the window, and
    the centre of one of them must lie inside. After `crop_trials` windows that fail another IoU is
    drawn. Source: SSD paper, section 2.2.
    """
    highest_iou = _highest_reachable_iou(boxes_xyxy, width, height, recipe)
    while True:
        min_iou = recipe.crop_ious[rng.integers(len(recipe.crop_ious))]
        if min_iou is NO_CROP:
            return Window(0, 0, width, height)
        # Most of the time would go into windows that cannot succeed, so these are not even drawn.
        if min_iou > highest_iou:
            continue
        windows = _random_windows(width, height, recipe, rng)
        is_acceptable = _are_acceptable(windows, boxes_xyxy, min_iou)
        if is_acceptable.any():
            first = is_acceptable.argmax()
            left, top, right, bottom = windows[first].astype(int).tolist()
            return Window(left, top, right, bottom)


def _highest_reachable_iou(
    boxes_xyxy: np.ndarray, width: int, height: int, recipe: Recipe
) -> float:
    """Return a bound of the IoU that a window can have with all boxes.

    A box shares at most its own area with a window, and a union is at least the window's area.
    """
    box_areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    # Rounding to whole pixels can make the window's sides up to a pixel shorter.
    smallest_window = recipe.crop_scale[0] ** 2 * width * height - width - height
    return box_areas.min() / max(smallest_window, 1)


def _random_windows(
    width: int, height: int, recipe: Recipe, rng: np.random.Generator
) -> np.ndarray:
    """Draw `crop_trials` windows, (trials, 4) float64 of whole numbers."""
    trials = recipe.crop_trials
    scale = rng.uniform(*recipe.crop_scale, trials)
    # Numbers in 0..1 are scaled here, because rng.uniform is slow where its limits are arrays.
    ratio_draw, left_draw, top_draw = rng.random((3, trials))
    # Neither side may be longer than the image's.
    lowest_ratio = np.maximum(recipe.crop_ratio[0], scale * scale)
    highest_ratio = np.minimum(recipe.crop_ratio[1], 1 / (scale * scale))
    stretch = np.sqrt(lowest_ratio + (highest_ratio - lowest_ratio) * ratio_draw)
    window_width = np.floor(scale * stretch * width)
    window_height = np.floor(scale / stretch * height)
    left = np.floor(left_draw * np.maximum(width - window_width, 1))
    top = np.floor(top_draw * np.maximum(height - window_height, 1))
    return np.stack([left, top, left + window_width, top + window_height], axis=1)


def smallest_window_sides(image_sizes: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return the smallest width and height (I, 2) of any crop, at least 1 pixel.

    `image_sizes` (I, 2) are heights and widths. The smallest width and the smallest height do not
    come together.
    """
    scale = recipe.crop_scale[0]
    narrowest = scale * max(recipe.crop_ratio[0], scale**2) ** 0.5
    lowest = scale / min(recipe.crop_ratio[1], 1 / scale**2) ** 0.5
    sides = np.floor(image_sizes[:, ::-1] * (narrowest, lowest))
    return np.maximum(sides, 1)


def _are_acceptable(windows: np.ndarray, boxes_xyxy: np.ndarray, min_iou: float) -> np.ndarray:
    """Return which windows (W, 4) have the IoU with every box, and the centre of one, (W,) bool."""
    left, top, right, bottom = windows.T[:, :, np.newaxis]  # (W, 1) each
    x1, y1, x2, y2 = boxes_xyxy.T  # (n,) each
    center_x = (x1 + x2) / 2
    center_y = (y1 + y2) / 2
    is_inside_x = (left < center_x) & (center_x < right)
    is_inside_y = (top < center_y) & (center_y < bottom)
    has_center = (is_inside_x & is_inside_y).any(axis=1)

    overlap_width = np.minimum(x2, right) - np.maximum(x1, left)
    overlap_height = np.minimum(y2, bottom) - np.maximum(y1, top)
    overlap = np.maximum(overlap_width, 0) * np.maximum(overlap_height, 0)
    box_areas = (x2 - x1) * (y2 - y1)
    window_areas = (right - left) * (bottom - top)
    iou = overlap / (box_areas + window_areas - overlap)
    return has_center & (iou.min(axis=1) >= min_iou)


def expanded_canvas(width: int, height: int, recipe: Recipe, rng: np.random.Generator) -> Canvas:
    """Draw a canvas for a picture of this size: the picture itself or something larger.

    Source: SSD paper, section 3.6 ("zoom out").
    """
    if rng.random() > recipe.expand_probability:
        return Canvas(width, height, 0, 0)
    while True:
        scale = rng.uniform(*recipe.expand_scale)
        lowest_ratio = max(recipe.expand_ratio[0], 1 / scale**2)
        highest_ratio = min(recipe.expand_ratio[1], scale**2)
        stretch = rng.uniform(lowest_ratio, highest_ratio) ** 0.5
        # Rounding can make a side shorter than the picture's.
        if scale * stretch >= 1 and scale / stretch >= 1:
            break
    canvas_width = int(scale * stretch * width)
    canvas_height = int(scale / stretch * height)
    left = int(rng.integers(canvas_width - width + 1))
    top = int(rng.integers(canvas_height - height + 1))
    return Canvas(canvas_width, canvas_height, left, top)


def move_boxes(
    boxes_xyxy: np.ndarray, labels: np.ndarray, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (n, 4) of an image in normalised xyxy of the network input, with their labels.

    Boxes whose centre lies outside the window are left out, the others are clipped to it.
    """
    window = geometry.window
    top_left = np.array([window.left, window.top])
    bottom_right = np.array([window.right, window.bottom])
    center = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    is_inside = ((top_left < center) & (center < bottom_right)).all(axis=1)

    corners = boxes_xyxy[is_inside].reshape(-1, 2, 2)  # (n, corner, x and y)
    corners = corners.clip(top_left, bottom_right)
    boxes = _to_network_input(corners.reshape(-1, 4), geometry)
    return boxes, labels[is_inside]


def picture_box(geometry: Geometry) -> np.ndarray:
    """Return where the picture lies in the network input, (4,) normalised xyxy."""
    return _to_network_input(np.array([geometry.window]), geometry)[0]


def _to_network_input(boxes_xyxy: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return boxes (n, 4) inside the window in normalised xyxy of the network input."""
    window = geometry.window
    canvas = geometry.canvas
    left, top, right, bottom = boxes_xyxy.T
    left = left - window.left + canvas.left
    right = right - window.left + canvas.left
    top = top - window.top + canvas.top
    bottom = bottom - window.top + canvas.top
    if geometry.flip:
        left, right = canvas.width - right, canvas.width - left
    boxes = np.stack([left, top, right, bottom], axis=1)
    return boxes / (canvas.width, canvas.height, canvas.width, canvas.height)
