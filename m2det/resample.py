"""Resizing as OpenCV does it: without antialiasing, half-pixel centres, edges repeated.

Pictures are cut out, put on a larger canvas, mirrored and resized in one pass over what is seen of
them: every output row and column is a weighted sum of a few source rows and columns.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def taps(canvas: int, size: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Source positions (size, K) and weights (size, K) that resize `canvas` pixels to `size`.

    `method`: nearest, linear, cubic (a = -0.75), lanczos (a = 4), area (mean of the covered
    pixels, for shrinking) or area_linear (what OpenCV makes of "area" where it cannot shrink).
    """
    step = canvas / size
    out = np.arange(size)[:, None]
    centre = (out + 0.5) * step - 0.5
    if method == "nearest":
        first, weights = np.floor(out * step), np.ones((size, 1))
    elif method == "linear":
        first = np.floor(centre)
        weights = 1 - np.abs(centre - first - np.arange(2))
    elif method == "cubic":
        first = np.floor(centre) - 1
        x = np.abs(centre - first - np.arange(4))
        near, far = ((1.25 * x - 2.25) * x) * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
        weights = np.where(x < 1, near, far)
    elif method == "lanczos":
        first = np.floor(centre) - 3
        x = centre - first - np.arange(8)
        weights = np.sinc(x) * np.sinc(x / 4)
        weights /= weights.sum(axis=1, keepdims=True)
    elif method == "area":
        first = np.floor(out * step)
        left = first + np.arange(math.ceil(step) + 1)
        covered = np.minimum(left + 1, (out + 1) * step) - np.maximum(left, out * step)
        weights = np.maximum(covered, 0) / step
    else:
        first = np.floor(out * step)
        second = np.maximum((out + 1) - (first + 1) / step, 0) % 1
        weights = np.concatenate([1 - second, second], axis=1)
    positions = first + np.arange(weights.shape[1])
    return np.clip(positions, 0, canvas - 1).astype(np.int64), weights.astype(np.float32)


def render(
    image: np.ndarray,
    place: tuple[int, int],
    canvas: tuple[int, int],
    size: int,
    method: str,
    mirror: bool,
    fill: tuple[int, ...],
) -> Tensor:
    """Image (H, W, 3) uint8 on a canvas of colour `fill`, resized: (size, 3, size) uint8, that is
    column, channel, row.

    `place`: (left, top) on the canvas of `canvas` (width, height) pixels, which may be mirrored.
    """
    if method == "area" and min(canvas) < size:
        method = "area_linear"
    height, width = image.shape[:2]
    left = canvas[0] - width - place[0] if mirror else place[0]
    columns, column_weights, at_x = _seen(width, left, *taps(canvas[0], size, method))
    rows, row_weights, at_y = _seen(height, place[1], *taps(canvas[1], size, method))
    if mirror:
        columns = width - 1 - columns

    # Around the picture there is 0 once the canvas is subtracted.
    around = np.array(fill, np.float32)
    pixels = torch.from_numpy(image).reshape(height, -1).float()
    pixels -= torch.from_numpy(np.tile(around, width))
    pixels = F.embedding_bag(rows, pixels, mode="sum", per_sample_weights=row_weights)
    pixels = _weigh_columns(pixels, columns, column_weights)
    pixels += torch.from_numpy(np.tile(around + 0.5, len(columns))).unsqueeze(1)
    made = _plain(size, fill).clone()
    seen = made[at_x : at_x + len(columns), :, at_y : at_y + len(rows)]
    seen.copy_(pixels.clamp_(0, 255).view(seen.shape))
    return made


@functools.cache
def _plain(size: int, fill: tuple[int, ...]) -> Tensor:
    """A canvas (size, 3, size): column, channel, row."""
    return torch.tensor(fill, dtype=torch.uint8).view(3, 1).repeat(size, 1, size)


def _seen(
    length: int, offset: int, positions: np.ndarray, weights: np.ndarray
) -> tuple[Tensor, Tensor, int]:
    """The outputs that see a picture `length` long at `offset` of the canvas, and where they begin.

    Taps beside the picture get weight 0.
    """
    positions = positions - offset
    inside = (positions >= 0) & (positions < length)
    outputs = inside.any(axis=1)
    weights = np.where(inside, weights, np.float32(0))[outputs]
    positions = np.where(inside, positions, 0)[outputs]
    return torch.from_numpy(positions), torch.from_numpy(weights), int(outputs.argmax())


def resize(image: np.ndarray, size: int) -> Tensor:
    """Image (H, W, 3) uint8 to (size, size, 3): bilinear, to the bit as OpenCV computes it.

    In whole numbers, with weights of 11 bits: a sum along the row is cut by 4 bits, a product along
    the column by 16.
    """
    height, width = image.shape[:2]
    pixels = torch.from_numpy(image).reshape(height, -1).float()
    pixels = _weigh_columns(pixels, *map(torch.from_numpy, _whole_taps(width, size)))
    pixels = pixels.T.contiguous().int() >> 4  # whole numbers below 2 ** 20: exact in fp32 so far
    positions, weights = map(torch.from_numpy, _whole_taps(height, size))
    first, second = (
        (pixels.index_select(0, row) * weight.int().unsqueeze(1)) >> 16
        for row, weight in zip(positions.T, weights.T, strict=True)
    )
    return ((first + second + 2) >> 2).byte().reshape(size, size, 3)


def _weigh_columns(pixels: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Pixels (H, W * 3) to (C * 3, H): column c is the weighted sum of `columns` (C, K)."""
    channels = (3 * columns.unsqueeze(1) + torch.arange(3).unsqueeze(1)).flatten(0, 1)
    weights = weights.repeat_interleave(3, dim=0)
    pixels = pixels.T.contiguous()
    return F.embedding_bag(channels, pixels, mode="sum", per_sample_weights=weights)


def _whole_taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two source positions (size, 2) and their weights (size, 2) float32: whole, of 2048."""
    centre = ((np.arange(size)[:, None] + 0.5) * (length / size) - 0.5).astype(np.float32)
    first = np.floor(centre)
    second = centre - first
    positions = np.clip(first + np.arange(2), 0, length - 1).astype(np.int64)
    return positions, np.rint(np.concatenate([1 - second, second], axis=1) * 2048)
