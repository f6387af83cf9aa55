"""Resizing as OpenCV does it: without antialias, pixel centres at halves, edges repeated.

A picture is put on a larger canvas, flipped and resized in one pass over its visible pixels: every
row and column of the result is a weighted sum of a few rows and columns of the source.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2det.geometry import Canvas

CHANNELS = 3


class Taps(NamedTuple):
    """For each of R pixels of a result the K pixels of the source whose weighted sum it is."""

    positions: np.ndarray  # (R, K) int64, neighbouring pixels of the source in each row
    weights: np.ndarray  # (R, K) float32


def make_taps(length: int, size: int, interpolation: str) -> Taps:
    """Return the taps that resize `length` pixels to `size`.

    `interpolation` is a key of KERNELS: an OpenCV method, or "area_linear", which is what OpenCV
    makes of its area method where it enlarges.
    """
    step = length / size
    pixel = np.arange(size)[:, np.newaxis]
    first, weights = KERNELS[interpolation](pixel, step)
    positions = first.astype(np.int64) + np.arange(weights.shape[1])
    return Taps(positions.clip(0, length - 1), weights.astype(np.float32))


# A kernel takes the pixels (R, 1) of a result and the step from one to the next in the source. It
# returns the first position (R, 1) and the weights (R, K) of each. Positions may lie beside the
# source, whose edge is repeated.


def _center(pixel: np.ndarray, step: float) -> np.ndarray:
    return (pixel + 0.5) * step - 0.5


def _nearest(pixel: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    return np.floor(pixel * step), np.ones(pixel.shape)


def _linear(pixel: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    center = _center(pixel, step)
    first = np.floor(center)
    second_weight = center - first
    return first, np.concatenate([1 - second_weight, second_weight], axis=1)


def _cubic(pixel: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Keys' cubic convolution with a = -0.75."""
    center = _center(pixel, step)
    first = np.floor(center) - 1
    x = np.abs(center - first - np.arange(4))
    near = ((1.25 * x - 2.25) * x) * x + 1
    far = ((-0.75 * x + 3.75) * x - 6) * x + 3
    return first, np.where(x < 1, near, far)


def _lanczos(pixel: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """sinc(x) sinc(x / 4), scaled to a sum of 1."""
    center = _center(pixel, step)
    first = np.floor(center) - 3
    x = (center - first - np.arange(8)).astype(np.float32)
    x[x == 0] = 1e-6
    # The factor sin(pi x) is the same for all eight but for its sign, so it need not be computed.
    weights = np.sin(np.float32(math.pi / 4) * x) / (x * x)
    weights[:, ::2] *= -1
    return first, weights / weights.sum(axis=1, keepdims=True)


def _area(pixel: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the covered pixels, for shrinking."""
    start = pixel * step
    end = (pixel + 1) * step
    first = np.floor(start)
    left = first + np.arange(math.ceil(step) + 1)
    covered = np.minimum(left + 1, end) - np.maximum(left, start)
    return first, np.maximum(covered, 0) / step


def _area_linear(pixel: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """The nearest pixel, blended with the next one only in the result's pixel that covers both."""
    first = np.floor(pixel * step)
    second_weight = np.maximum((pixel + 1) - (first + 1) / step, 0) % 1
    return first, np.concatenate([1 - second_weight, second_weight], axis=1)


KERNELS = {
    "nearest": _nearest,
    "linear": _linear,
    "cubic": _cubic,
    "lanczos": _lanczos,
    "area": _area,
    "area_linear": _area_linear,
}


def render(
    image: np.ndarray,
    canvas: Canvas,
    size: int,
    interpolation: str,
    flip: bool,
    fill: tuple[int, ...],
) -> Tensor:
    """Put an image (H, W, 3) uint8 on a canvas, flip the canvas, and resize it to `size`.

    `fill` is the colour of the canvas. The result is (size, 3, size) uint8 in the order column,
    channel, row, because the pass along rows comes last.
    """
    if interpolation == "area" and min(canvas.width, canvas.height) < size:
        interpolation = "area_linear"
    height, width = image.shape[:2]
    left = canvas.left
    if flip:
        left = canvas.width - width - canvas.left
    columns, visible_columns = _visible_taps(
        make_taps(canvas.width, size, interpolation), left, width
    )
    rows, visible_rows = _visible_taps(
        make_taps(canvas.height, size, interpolation), canvas.top, height
    )
    result = np.empty((size, CHANNELS, size), np.uint8)
    result[:] = np.array(fill, np.uint8)[:, np.newaxis]
    if not len(columns.positions) or not len(rows.positions):
        return torch.from_numpy(result)
    if flip:
        columns = Taps(width + 1 - columns.positions, columns.weights)

    # Beside the image lies a pixel of the canvas on each side, which is all that blends with it.
    dtype = np.uint8 if interpolation == "nearest" else np.float32
    source = np.empty((height + 2, width + 2, CHANNELS), dtype)
    source[[0, -1]] = fill
    source[:, [0, -1]] = fill
    source[1:-1, 1:-1] = image
    pixels = _weighted_rows(torch.from_numpy(source).flatten(1), rows)
    pixels = _weighted_rows(_transpose(pixels), _for_each_channel(columns))
    if interpolation != "nearest":
        pixels.add_(0.5).clamp_(0, 255)
    visible = pixels.numpy().reshape(len(columns.positions), CHANNELS, len(rows.positions))
    result[visible_columns, :, visible_rows] = visible
    return torch.from_numpy(result)


def _visible_taps(taps: Taps, offset: int, length: int) -> tuple[Taps, slice]:
    """Return the taps of those pixels of the result that show the image, and which these are.

    The image covers `length` pixels of the canvas from `offset` on. The positions of the returned
    taps count from the pixel before it; that one and the one after the image are canvas.
    """
    positions = (taps.positions - offset + 1).clip(0, length + 1)
    is_visible = (positions[:, -1] > 0) & (positions[:, 0] <= length)
    first = int(is_visible.argmax())
    visible = slice(first, first + int(is_visible.sum()))
    return Taps(positions[visible], taps.weights[visible]), visible


def _for_each_channel(columns: Taps) -> Taps:
    """Return the taps of columns as those of rows of a transposed image (W * 3, H).

    There the three channels of a column follow one another.
    """
    channel = np.arange(CHANNELS)[:, np.newaxis]
    positions = CHANNELS * columns.positions[:, np.newaxis] + channel  # (R, 3, K)
    positions = positions.reshape(-1, columns.positions.shape[1])
    return Taps(positions, columns.weights.repeat(CHANNELS, axis=0))


def _weighted_rows(pixels: Tensor, taps: Taps) -> Tensor:
    """Return the weighted sums (R, N) of rows of pixels (H, N)."""
    positions = torch.from_numpy(taps.positions)
    if positions.shape[1] == 1:
        return pixels[positions[:, 0]]
    weights = torch.from_numpy(taps.weights)
    return F.embedding_bag(positions, pixels, mode="sum", per_sample_weights=weights)


def _transpose(pixels: Tensor) -> Tensor:
    """Return pixels (H, N) as (N, H), contiguous.

    This is `pixels.T.contiguous()`, with which a training sample takes 10 % longer on x86: a
    shuffle of channels has a faster kernel in the layout channels last.
    """
    height = len(pixels)
    channels_last = pixels.view(1, 1, 1, -1).permute(0, 3, 1, 2)
    return F.channel_shuffle(channels_last, height).view(-1, height)
