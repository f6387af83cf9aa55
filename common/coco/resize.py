"""Resizing an image exactly as OpenCV's INTER_LINEAR does, for the input of evaluation."""

from typing import NamedTuple

import numpy as np

WEIGHT_SUM = 2048  # OpenCV computes in integers: weights have 11 bits


class LinearTaps(NamedTuple):
    """The two source pixels of each of R pixels of a result, and their weights."""

    first: np.ndarray  # (R,) int64
    second: np.ndarray  # (R,) int64
    first_weight: np.ndarray  # (R,) int32, of a sum of WEIGHT_SUM with the other
    second_weight: np.ndarray  # (R,) int32


def resize_as_opencv(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to (height, width, 3) exactly as OpenCV's INTER_LINEAR does.

    4 bits are dropped after blending columns, 16 bits after the product with each row's weight, and
    the last 2 are rounded off.
    """
    rows = _linear_taps(image.shape[0], height)
    columns = _linear_taps(image.shape[1], width)

    # Blend the columns of those rows only that the result needs.
    needed_rows, position = np.unique([rows.first, rows.second], return_inverse=True)
    upper_position, lower_position = position.reshape(2, height)
    needed = image[needed_rows]
    left = needed.take(columns.first, axis=1).astype(np.int32)
    left *= columns.first_weight[:, None]
    right = needed.take(columns.second, axis=1).astype(np.int32)
    right *= columns.second_weight[:, None]
    blended = (left + right) >> 4

    upper = (blended[upper_position] * rows.first_weight[:, None, None]) >> 16
    lower = (blended[lower_position] * rows.second_weight[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _linear_taps(length: int, size: int) -> LinearTaps:
    """Return the taps that resize `length` pixels to `size`.

    Beyond the edge of the source both taps are its last pixel, but they keep their two weights: the
    bits that are dropped from each of the two products are part of OpenCV's result.
    """
    center = (np.arange(size) + 0.5) * (length / size) - 0.5
    center = center.astype(np.float32)  # OpenCV's precision, which decides some roundings
    before = np.floor(center)
    second_weight = np.rint((center - before) * WEIGHT_SUM).astype(np.int32)
    first = before.astype(np.int64)
    return LinearTaps(
        first=first.clip(0, length - 1),
        second=(first + 1).clip(0, length - 1),
        first_weight=WEIGHT_SUM - second_weight,
        second_weight=second_weight,
    )
