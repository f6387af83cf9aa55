"""The original's training transform, its draws from Python's `random` in their order (spec 5).

Images are (H, W, 3) uint8 BGR, boxes (n, 4) float64 xyxy in pixels.
"""

import math
import random

import cv2
import numpy as np

from m2det.geometry import Canvas, Geometry, Window

FILL = (104, 117, 123)
MODES = (None, 0.1, 0.3, 0.5, 0.7, 0.9, float("-inf"))
INTERPOLATIONS = {
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST,
    "lanczos": cv2.INTER_LANCZOS4,
}


def crop(boxes, size):
    """The Window."""
    width, height = size
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    while True:
        limit = random.choice(MODES)
        if limit is None:
            return Window(0, 0, width, height)
        for _ in range(50):
            scale = random.uniform(0.3, 1)
            ratio = math.sqrt(random.uniform(max(0.5, scale * scale), min(2, 1 / scale / scale)))
            w, h = int(scale * ratio * width), int((scale / ratio) * height)
            left, top = random.randrange(width - w), random.randrange(height - h)
            window = np.array([left, top, left + w, top + h])
            shared = np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2])
            overlap = np.maximum(shared, 0).prod(axis=1)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            if (overlap / (areas + w * h - overlap)).min() < limit:
                continue
            if ((window[:2] < centers) & (centers < window[2:])).all(axis=1).any():
                return Window(*window.tolist())


def draw_colour_jitter():
    """What is added, factor, hue shift, factor of saturation."""
    added = random.uniform(-32, 32) if random.randrange(2) else 0
    factor = random.uniform(0.5, 1.5) if random.randrange(2) else 1
    hue = random.randint(-18, 18) if random.randrange(2) else 0
    saturation = random.uniform(0.5, 1.5) if random.randrange(2) else 1
    return added, factor, hue, saturation


def recolour(image, added, factor, hue, saturation):
    image = np.clip(image + float(added), 0, 255).astype(np.uint8)
    image = np.clip(image * float(factor), 0, 255).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
    hsv[..., 1] = np.clip(hsv[..., 1] * float(saturation), 0, 255).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def expand(size, probability=0.6):
    """The Canvas of a picture of `size` (width, height)."""
    width, height = size
    if random.random() > probability:
        return Canvas(width, height, 0, 0)
    while True:
        scale = random.uniform(1, 4)
        ratio = math.sqrt(random.uniform(max(0.5, 1 / scale / scale), min(2, scale * scale)))
        ws, hs = scale * ratio, scale / ratio
        if ws < 1 or hs < 1:
            continue
        w, h = int(ws * width), int(hs * height)
        return Canvas(w, h, random.randint(0, w - width), random.randint(0, h - height))


def on_canvas(image, canvas):
    made = np.full((canvas.height, canvas.width, 3), FILL, np.uint8)
    height, width = image.shape[:2]
    made[canvas.top : canvas.top + height, canvas.left : canvas.left + width] = image
    return made


def resized(image, size, interpolation):
    made = cv2.resize(image, (size, size), interpolation=INTERPOLATIONS[interpolation])
    return made.astype(np.float32) - np.array(FILL, np.float32)


def interpolation():
    return [*INTERPOLATIONS][random.randrange(5)]


def transform(image, boxes, size):
    """Input (size, size, 3), Geometry, colour jitter."""
    height, width = image.shape[:2]
    window = crop(boxes, (width, height))
    cut = image[window.top : window.bottom, window.left : window.right]
    colour_jitter = draw_colour_jitter()
    canvas = expand((window.width, window.height))
    flip = bool(random.randrange(2))
    geometry = Geometry(window, canvas, flip, interpolation())
    made = on_canvas(recolour(cut, *colour_jitter), canvas)
    if flip:
        made = made[:, ::-1]
    return resized(made, size, geometry.interpolation), geometry, colour_jitter
