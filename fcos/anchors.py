"""Points and box coding: pure functions of the recipe. FCOS paper, section 3.1.

Boxes are xyxy in pixels of the network's input; distances go from a point to the left, top, right
and bottom side of a box.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fcos.config import Recipe

Sizes = tuple[tuple[int, int], ...]  # (rows, columns) of each level's map


class Level(NamedTuple):
    """The points of one level, a grid, in pixels."""

    x: Tensor  # (columns,) float32
    y: Tensor  # (rows,) float32
    stride: int
    low: float  # a box whose largest distance lies in low..high belongs to this level
    high: float


def map_sizes(recipe: Recipe, height: int, width: int) -> Sizes:
    """The levels' map sizes for an input of `height` x `width` pixels."""
    return tuple((-(-height // stride), -(-width // stride)) for stride in recipe.strides)


@functools.lru_cache(maxsize=16)  # a run uses few shapes
def make_levels(
    recipe: Recipe, sizes: Sizes, device: torch.device | None = None
) -> tuple[Level, ...]:
    """The grids of all levels."""
    bounds = zip(recipe.strides, recipe.ranges[:-1], recipe.ranges[1:], sizes, strict=True)
    levels = []
    for stride, low, high, (rows, columns) in bounds:
        x, y = (
            torch.arange(n, dtype=torch.float32, device=device) * stride + stride // 2
            for n in (columns, rows)
        )
        levels.append(Level(x, y, stride, low, high))
    return tuple(levels)


@functools.lru_cache(maxsize=16)
def make_anchors(recipe: Recipe, sizes: Sizes, device: torch.device | None = None) -> Tensor:
    """Points (P, 2) float32 `x, y`, in the order of the raw outputs: level, row, column."""
    points = []
    for level in make_levels(recipe, sizes, device):
        y, x = torch.meshgrid(level.y, level.x, indexing="ij")
        points.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
    return torch.cat(points)


@functools.lru_cache(maxsize=16)
def point_strides(recipe: Recipe, sizes: Sizes, device: torch.device) -> Tensor:
    """The stride (P, 1) float32 of each point's level."""
    counts = [rows * columns for rows, columns in sizes]
    strides = [torch.full((n, 1), s) for n, s in zip(counts, recipe.strides, strict=True)]
    return torch.cat(strides).float().to(device)


def encode(boxes_xyxy: Tensor, points: Tensor) -> Tensor:
    """Distances (..., 4) left, top, right, bottom of boxes to their points (..., 2)."""
    return torch.cat([points - boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - points], dim=-1)


def decode(distances: Tensor, points: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy from distances: the inverse of `encode`, not clipped."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
