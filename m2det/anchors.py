"""Anchors and box coding: pure functions of the recipe.

Boxes have two forms, both normalised to the image: `cxcywh` (centre and size) and `xyxy` (corners).
"""

import math

import torch
from torch import Tensor

from m2det.config import Recipe

SMALLEST_ENCODED_SIDE = 1e-7  # normalised; the logarithm of a smaller side would be infinite


def make_anchors(recipe: Recipe) -> Tensor:
    """Return the anchors (P, 4) float32 `cxcywh`; P is 32760 for M2Det512.

    They are in the order of the raw outputs: feature map, row, column, shape. As in the original,
    they are computed in double precision, rounded to float32 once, and clamped to 0..1, sizes too.
    """
    # The original rounds its sizes, in pixels, to two decimals.
    sides = [round(size * recipe.image_size, 2) for size in recipe.anchor_sizes]
    anchors = []
    for level, cells in enumerate(recipe.anchor_maps):
        shapes = _anchor_shapes(
            small=sides[level] / recipe.image_size,
            large=sides[level + 1] / recipe.image_size,
            ratios=recipe.anchor_ratios,
        )
        cells_per_image = recipe.image_size / recipe.anchor_steps[level]
        center = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells_per_image
        center_y, center_x = torch.meshgrid(center, center, indexing="ij")
        centers = torch.stack([center_x, center_y], dim=-1)  # (row, column, 2)
        centers = centers.unsqueeze(2).expand(-1, -1, len(shapes), -1)
        sizes = torch.tensor(shapes, dtype=torch.float64).expand(cells, cells, -1, -1)
        boxes = torch.cat([centers, sizes], dim=-1)  # (row, column, shape, 4)
        anchors.append(boxes.reshape(-1, 4))
    return torch.cat(anchors).float().clamp(0, 1)


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
    """Return the number of anchors in a cell of each feature map: the same on all maps."""
    return (2 + 2 * len(recipe.anchor_ratios),) * len(recipe.anchor_maps)


def to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Return boxes (..., 4) given by centre and size in corner form."""
    center = boxes_cxcywh[..., :2]
    half_size = 0.5 * boxes_cxcywh[..., 2:]
    return torch.cat([center - half_size, center + half_size], dim=-1)


def to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Return boxes (..., 4) given by their corners in centre form."""
    top_left = boxes_xyxy[..., :2]
    bottom_right = boxes_xyxy[..., 2:]
    return torch.cat([0.5 * (top_left + bottom_right), bottom_right - top_left], dim=-1)


def encode(boxes_cxcywh: Tensor, anchors_cxcywh: Tensor, recipe: Recipe) -> Tensor:
    """Return the deltas (..., 4) from anchors (..., 4) to boxes (..., 4).

    Source: SSD paper, equation 2, divided by the variances of its reference implementation.
    """
    center = boxes_cxcywh[..., :2]
    size = boxes_cxcywh[..., 2:].clamp(min=SMALLEST_ENCODED_SIDE)
    anchor_center = anchors_cxcywh[..., :2]
    anchor_size = anchors_cxcywh[..., 2:]
    center_delta = (center - anchor_center) / (anchor_size * recipe.center_variance)
    size_delta = (size / anchor_size).log() / recipe.size_variance
    return torch.cat([center_delta, size_delta], dim=-1)


def decode(deltas: Tensor, anchors_cxcywh: Tensor, recipe: Recipe) -> Tensor:
    """Return the boxes (..., 4) `cxcywh` of deltas (..., 4): the inverse of `encode`.

    They are not clipped to the image.
    """
    anchor_center = anchors_cxcywh[..., :2]
    anchor_size = anchors_cxcywh[..., 2:]
    center = deltas[..., :2] * recipe.center_variance * anchor_size + anchor_center
    size = (deltas[..., 2:] * recipe.size_variance).exp() * anchor_size
    return torch.cat([center, size], dim=-1)
