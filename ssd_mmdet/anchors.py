"""Anchors and box coding: pure functions of the recipe.

All boxes are xyxy in pixels of the network input.
"""

import math

import torch
from torch import Tensor

from ssd_mmdet.config import Recipe

SMALLEST_ENCODED_SIDE = 1e-7  # pixels; the logarithm of a side of 0 would be infinite


def make_anchors(recipe: Recipe) -> Tensor:
    """Return the anchors (P, 4) float32 xyxy; P is 8732 for SSD300.

    They are in the order of the raw outputs: feature map, row, column, shape. As in MMDetection,
    each is centred on its cell and none is clipped to the network input.
    """
    anchors = []
    for level, cells in enumerate(recipe.anchor_maps):
        shapes = _anchor_shapes(
            small=recipe.anchor_sizes[level],
            large=recipe.anchor_sizes[level + 1],
            ratios=recipe.anchor_ratios[level],
        )
        center = (torch.arange(cells) + 0.5) * recipe.anchor_strides[level]
        center_y, center_x = torch.meshgrid(center, center, indexing="ij")
        centers = torch.stack([center_x, center_y], dim=-1)  # (row, column, 2)
        centers = centers.unsqueeze(2)  # (row, column, 1, 2)
        half_sizes = torch.tensor(shapes) / 2  # (shape, 2)
        boxes = torch.cat([centers - half_sizes, centers + half_sizes], dim=-1)
        anchors.append(boxes.reshape(-1, 4))
    return torch.cat(anchors)


def _anchor_shapes(small: float, large: float, ratios: tuple[int, ...]) -> list[tuple]:
    """Return (width, height) of the anchors of a cell (SSD paper, section 2.2).

    A small square comes first, then the square halfway (geometrically) to the `large` one, then a
    wide and a tall rectangle of the small square's area for each ratio.
    """
    between = math.sqrt(small * large)
    shapes = [(small, small), (between, between)]
    for ratio in ratios:
        long_side = small * math.sqrt(ratio)
        short_side = small / math.sqrt(ratio)
        shapes.append((long_side, short_side))
        shapes.append((short_side, long_side))
    return shapes


def anchors_per_cell(recipe: Recipe) -> tuple[int, ...]:
    """Return the number of anchor shapes of each feature map."""
    return tuple(2 + 2 * len(ratios) for ratios in recipe.anchor_ratios)


def encode(boxes_xyxy: Tensor, anchors_xyxy: Tensor, recipe: Recipe) -> Tensor:
    """Return the deltas (..., 4) from anchors (..., 4) to boxes (..., 4).

    Source: SSD paper, equation 2, divided by the variances of its reference implementation.
    """
    center, size = _center_and_size(boxes_xyxy)
    anchor_center, anchor_size = _center_and_size(anchors_xyxy)
    center_delta = (center - anchor_center) / anchor_size / recipe.center_variance
    size = size.clamp(min=SMALLEST_ENCODED_SIDE)
    size_delta = (size / anchor_size).log() / recipe.size_variance
    return torch.cat([center_delta, size_delta], dim=-1)


def decode(deltas: Tensor, anchors_xyxy: Tensor, recipe: Recipe) -> Tensor:
    """Return the boxes (..., 4) xyxy of deltas (..., 4): the inverse of `encode`.

    The ratio of a box's side to the anchor's is limited to `size_ratio_limit` and its inverse, and
    boxes are clipped to the network input.
    """
    anchor_center, anchor_size = _center_and_size(anchors_xyxy)
    center = deltas[..., :2] * recipe.center_variance * anchor_size + anchor_center
    limit = math.log(recipe.size_ratio_limit)
    log_ratio = (deltas[..., 2:] * recipe.size_variance).clamp(-limit, limit)
    half_size = log_ratio.exp() * anchor_size * 0.5
    boxes = torch.cat([center - half_size, center + half_size], dim=-1)
    return boxes.clamp(0, recipe.image_size)


def _center_and_size(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Return centre (..., 2) as (x, y) and size (..., 2) as (width, height)."""
    top_left = boxes_xyxy[..., :2]
    bottom_right = boxes_xyxy[..., 2:]
    center = (top_left + bottom_right) * 0.5
    size = bottom_right - top_left
    return center, size
