"""Points and the coding of boxes: pure functions of the recipe. Source: FCOS paper, section 3.1.

All boxes are xyxy in pixels of the network input. The four distances of a box are those from a
point to its left, top, right and bottom side.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from common.arithmetic import ceil_div
from fcos.config import Recipe

MapSizes = tuple[tuple[int, int], ...]  # (rows, columns) of the feature map of each level

# A run uses few shapes of the network input, and the points of a shape are always the same.
REMEMBERED_SHAPES = 16


class Level(NamedTuple):
    """The points of one level, which form a grid; all numbers are in pixels."""

    x: Tensor  # (columns,) float32
    y: Tensor  # (rows,) float32
    stride: int
    # The level learns the boxes whose largest distance from the point is between these two.
    min_distance: float
    max_distance: float


class Axis(NamedTuple):
    """The columns, or the rows, of the points of all levels, level after level; all in pixels."""

    coordinates: Tensor  # (K,) float32
    # Of the level that each column or row belongs to, (K,) float32 like the coordinates.
    stride: Tensor
    min_distance: Tensor
    max_distance: Tensor
    counts: tuple[int, ...]  # how many belong to each level


def map_sizes(recipe: Recipe, height: int, width: int) -> MapSizes:
    """Return the feature map sizes of all levels for an input of `height` x `width` pixels."""
    sizes = []
    for stride in recipe.strides:
        rows = ceil_div(height, stride)
        columns = ceil_div(width, stride)
        sizes.append((rows, columns))
    return tuple(sizes)


@functools.lru_cache(maxsize=REMEMBERED_SHAPES)
def make_levels(
    recipe: Recipe, sizes: MapSizes, device: torch.device | None = None
) -> tuple[Level, ...]:
    """Return the grid of points of each level, from P3 to P7."""
    levels = []
    for i, (rows, columns) in enumerate(sizes):
        stride = recipe.strides[i]
        level = Level(
            x=_coordinates(columns, stride, device),
            y=_coordinates(rows, stride, device),
            stride=stride,
            min_distance=recipe.ranges[i],
            max_distance=recipe.ranges[i + 1],
        )
        levels.append(level)
    return tuple(levels)


@functools.lru_cache(maxsize=REMEMBERED_SHAPES)
def make_axes(
    recipe: Recipe, sizes: MapSizes, device: torch.device | None = None
) -> tuple[Axis, Axis]:
    """Return the columns and the rows of the points of all levels."""
    levels = make_levels(recipe, sizes, device)
    columns = _make_axis(levels, [level.x for level in levels])
    rows = _make_axis(levels, [level.y for level in levels])
    return columns, rows


def _make_axis(levels: tuple[Level, ...], coordinates: list[Tensor]) -> Axis:
    """Return the axis of levels whose `coordinates` along it are given."""
    strides = []
    min_distances = []
    max_distances = []
    for level, of_level in zip(levels, coordinates, strict=True):
        strides.append(torch.full_like(of_level, level.stride))
        min_distances.append(torch.full_like(of_level, level.min_distance))
        max_distances.append(torch.full_like(of_level, level.max_distance))
    return Axis(
        coordinates=torch.cat(coordinates),
        stride=torch.cat(strides),
        min_distance=torch.cat(min_distances),
        max_distance=torch.cat(max_distances),
        counts=tuple(len(of_level) for of_level in coordinates),
    )


def _coordinates(count: int, stride: int, device: torch.device | None) -> Tensor:
    """Return the coordinates (count,) of points along one axis: the centres of their cells."""
    return torch.arange(count, dtype=torch.float32, device=device) * stride + stride // 2


@functools.lru_cache(maxsize=REMEMBERED_SHAPES)
def make_anchors(recipe: Recipe, sizes: MapSizes, device: torch.device | None = None) -> Tensor:
    """Return the points (P, 2) float32 as (x, y).

    They are in the order of the raw outputs: level, row, column.
    """
    points = []
    for level in make_levels(recipe, sizes, device):
        y, x = torch.meshgrid(level.y, level.x, indexing="ij")
        points.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
    return torch.cat(points)


@functools.lru_cache(maxsize=REMEMBERED_SHAPES)
def point_strides(recipe: Recipe, sizes: MapSizes, device: torch.device) -> Tensor:
    """Return the stride (P, 1) float32 of each point's level, in the order of `make_anchors`."""
    strides = []
    for stride, (rows, columns) in zip(recipe.strides, sizes, strict=True):
        strides.append(torch.full((rows * columns, 1), float(stride), device=device))
    return torch.cat(strides)


def clear_caches() -> None:
    """Forget all points. An export that traces the network leaves symbols among them."""
    make_levels.cache_clear()
    make_axes.cache_clear()
    make_anchors.cache_clear()
    point_strides.cache_clear()


def encode(boxes_xyxy: Tensor, points: Tensor) -> Tensor:
    """Return the distances (..., 4) from points (..., 2) to the sides of boxes (..., 4).

    Their order is left, top, right, bottom. Source: FCOS paper, equation 1.
    """
    left_top = points - boxes_xyxy[..., :2]
    right_bottom = boxes_xyxy[..., 2:] - points
    return torch.cat([left_top, right_bottom], dim=-1)


def decode(distances: Tensor, points: Tensor) -> Tensor:
    """Return the boxes (..., 4) xyxy of distances (..., 4): the inverse of `encode`, unclipped."""
    left_top = points - distances[..., :2]
    right_bottom = points + distances[..., 2:]
    return torch.cat([left_top, right_bottom], dim=-1)
