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
        second = centre - first
        weights = np.concatenate([1 - second, second], axis=1)
    elif method == "cubic":
        first = np.floor(centre) - 1
        x = np.abs(centre - first - np.arange(4))
        near, far = ((1.25 * x - 2.25) * x) * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
        weights = np.where(x < 1, near, far)
    elif method == "lanczos":
        first = np.floor(centre) - 3
        x = (centre - first - np.arange(8)).astype(np.float32)
        x[x == 0] = 1e-6
        # sinc(x) sinc(x / 4), whose sin(pi x) is the same in all eight but for its sign.
        weights = np.sin(np.float32(math.pi / 4) * x) / (x * x)
        weights[:, ::2] *= -1
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
    positions = first.astype(np.int64) + np.arange(weights.shape[1])
    return positions.clip(0, canvas - 1), weights.astype(np.float32)


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
    columns, column_weights, seen_x = _seen(width, left, *taps(canvas[0], size, method))
    rows, row_weights, seen_y = _seen(height, place[1], *taps(canvas[1], size, method))
    made = _plain(size, fill).copy()
    if not (len(columns) and len(rows)):
        return torch.from_numpy(made)
    if mirror:
        columns = width + 1 - columns
    channels = (3 * columns[:, None] + np.arange(3)[:, None]).reshape(-1, columns.shape[1])

    framed = np.empty((height + 2, width + 2, 3), np.uint8 if method == "nearest" else np.float32)
    framed[1:-1, 1:-1] = image
    framed[[0, -1]] = framed[:, [0, -1]] = fill
    pixels = _weigh(torch.from_numpy(framed).flatten(1), rows, row_weights)
    pixels = _weigh(_transpose(pixels), channels, column_weights.repeat(3, axis=0))
    if method != "nearest":
        pixels.add_(0.5).clamp_(0, 255)
    made[seen_x, :, seen_y] = pixels.numpy().reshape(len(columns), 3, len(rows))
    return torch.from_numpy(made)


@functools.cache
def _plain(size: int, fill: tuple[int, ...]) -> np.ndarray:
    """A canvas (size, 3, size): column, channel, row."""
    return np.tile(np.array(fill, np.uint8)[:, None], (size, 1, size))


def _seen(
    length: int, offset: int, positions: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, slice]:
    """Positions and weights of the outputs that see a picture `length` long at `offset` of the
    canvas, and which they are.

    These positions count from a pixel before the picture: it, and the one after, are canvas.
    """
    positions = (positions - offset + 1).clip(0, length + 1)
    seen = (positions[:, -1] > 0) & (positions[:, 0] <= length)
    outputs = slice(int(seen.argmax()), int(seen.argmax() + seen.sum()))
    return positions[outputs], weights[outputs], outputs


def resize(image: np.ndarray, size: int) -> Tensor:
    """Image (H, W, 3) uint8 to (size, size, 3): bilinear, to the bit as OpenCV computes it.

    In whole numbers, with weights of 11 bits: a sum along the row is cut by 4 bits, a product along
    the column by 16.
    """
    height, width = image.shape[:2]
    columns, weights = _whole_taps(width, size)
    channels = (3 * columns[:, None] + np.arange(3)[:, None]).reshape(-1, 2)
    pixels = _transpose(torch.from_numpy(image).reshape(height, -1)).float()
    pixels = _weigh(pixels, channels, weights.repeat(3, axis=0))
    pixels = _transpose(pixels).int() >> 4  # whole numbers below 2 ** 20: exact in fp32 so far
    positions, weights = map(torch.from_numpy, _whole_taps(height, size))
    first, second = (
        (pixels.index_select(0, row) * weight.int().unsqueeze(1)) >> 16
        for row, weight in zip(positions.T, weights.T, strict=True)
    )
    return ((first + second + 2) >> 2).byte().reshape(size, size, 3)


def _weigh(pixels: Tensor, positions: np.ndarray, weights: np.ndarray) -> Tensor:
    """Row r of the result is the weighted sum of the rows `positions` (R, K) of pixels (H, N)."""
    positions = torch.from_numpy(positions)
    if positions.shape[1] == 1:
        return pixels.index_select(0, positions.squeeze(1))
    weights = torch.from_numpy(weights)
    return F.embedding_bag(positions, pixels, mode="sum", per_sample_weights=weights)


def _transpose(pixels: Tensor) -> Tensor:
    """Pixels (H, N) to (N, H): `.T.contiguous()`, several times as fast on x86."""
    flat = pixels.view(1, 1, 1, -1).permute(0, 3, 1, 2)  # channels last
    return F.channel_shuffle(flat, len(pixels)).view(-1, len(pixels))


def _whole_taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two source positions (size, 2) and their weights (size, 2) float32: whole, of 2048."""
    centre = ((np.arange(size)[:, None] + 0.5) * (length / size) - 0.5).astype(np.float32)
    first = np.floor(centre)
    second = centre - first
    positions = np.clip(first + np.arange(2), 0, length - 1).astype(np.int64)
    return positions, np.rint(np.concatenate([1 - second, second], axis=1) * 2048)
