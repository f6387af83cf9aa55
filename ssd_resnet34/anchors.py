"""Anchors and the coding of boxes relative to them: pure functions of the recipe.

The SSD paper calls anchors "default boxes". Boxes come in two forms, both normalised to the image's
width and height: `cxcywh` (centre and size) and `xyxy` (left, top, right, bottom).
"""

import math

import torch
from torch import Tensor

from ssd_resnet34.config import Recipe

SMALLEST_ENCODED_SIDE = 1e-7  # normalised; the logarithm of a smaller side would be infinite


def make_anchors(recipe: Recipe) -> Tensor:
    """Return the anchors (8732, 4) float32 `cxcywh`, in the order of the network's outputs.

    That order is feature map, shape, row, column. As in the port, the numbers are computed in
    double precision and clamped to 0..1, which moves the outer centres of the 10x10 map inside.
    """
    anchors = [anchors_of_map(recipe, level) for level in range(len(recipe.anchor_maps))]
    return torch.cat(anchors).float().clamp_(0, 1)


def anchors_of_map(recipe: Recipe, level: int) -> Tensor:
    """Return the anchors (shapes * rows * columns, 4) float64 `cxcywh` of one feature map."""
    cells = recipe.anchor_maps[level]
    step = recipe.anchor_steps[level]
    centers = (torch.arange(cells, dtype=torch.float64) + 0.5) * step / recipe.image_size
    center_y, center_x = torch.meshgrid(centers, centers, indexing="ij")
    anchors = []
    for width, height in anchor_shapes(recipe, level):
        widths = torch.full_like(center_x, width / recipe.image_size)
        heights = torch.full_like(center_y, height / recipe.image_size)
        grid = torch.stack([center_x, center_y, widths, heights], dim=-1)
        anchors.append(grid.reshape(-1, 4))
    return torch.cat(anchors)


def anchor_shapes(recipe: Recipe, level: int) -> list[tuple[float, float]]:
    """Return width and height, in pixels, of the anchors in each cell of a feature map.

    They are two squares, then a wide and a tall box for each aspect ratio (SSD paper section 2.2).
    """
    size = recipe.anchor_sizes[level]
    larger_size = math.sqrt(size * recipe.anchor_sizes[level + 1])
    shapes = [(size, size), (larger_size, larger_size)]
    for ratio in recipe.anchor_ratios[level]:
        long_side = size * math.sqrt(ratio)
        short_side = size / math.sqrt(ratio)
        shapes.append((long_side, short_side))
        shapes.append((short_side, long_side))
    return shapes


def anchors_per_cell(recipe: Recipe) -> tuple[int, ...]:
    """Return the number of anchors in a cell of each feature map."""
    return tuple(2 + 2 * len(ratios) for ratios in recipe.anchor_ratios)


def to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Return boxes (..., 4) as corners."""
    center = boxes_cxcywh[..., :2]
    half_size = 0.5 * boxes_cxcywh[..., 2:]
    return torch.cat([center - half_size, center + half_size], dim=-1)


def to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Return boxes (..., 4) as centre and size."""
    top_left = boxes_xyxy[..., :2]
    bottom_right = boxes_xyxy[..., 2:]
    return torch.cat([0.5 * (top_left + bottom_right), bottom_right - top_left], dim=-1)


def encode(boxes_cxcywh: Tensor, anchors_cxcywh: Tensor, recipe: Recipe) -> Tensor:
    """Return the deltas (..., 4) of boxes to their anchors.

    Equation 2 of the SSD paper, with each half divided by its variance.
    """
    anchor_center = anchors_cxcywh[..., :2]
    anchor_size = anchors_cxcywh[..., 2:]
    size = boxes_cxcywh[..., 2:].clamp(min=SMALLEST_ENCODED_SIDE)
    shift = (boxes_cxcywh[..., :2] - anchor_center) / anchor_size / recipe.center_variance
    log_scale = (size / anchor_size).log() / recipe.size_variance
    return torch.cat([shift, log_scale], dim=-1)


def decode(deltas: Tensor, anchors_cxcywh: Tensor, recipe: Recipe) -> Tensor:
    """Return the boxes (..., 4) `cxcywh`, not clipped, of deltas: the inverse of `encode`."""
    anchor_center = anchors_cxcywh[..., :2]
    anchor_size = anchors_cxcywh[..., 2:]
    center = deltas[..., :2] * recipe.center_variance * anchor_size + anchor_center
    size = (deltas[..., 2:] * recipe.size_variance).exp() * anchor_size
    return torch.cat([center, size], dim=-1)
