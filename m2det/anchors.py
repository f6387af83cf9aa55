"""Default boxes ("priors") and box coding: pure functions of the recipe.

Two box forms, both normalised to the image: `cxcywh` (centre and size) and `ltrb` (corners).
"""

import math

import torch
from torch import Tensor

from m2det.config import Recipe


def make_anchors(recipe: Recipe) -> Tensor:
    """Priors (P, 4) float32 `cxcywh`, in the order of the raw outputs: map, row, column, shape.

    Computed in double precision, rounded to float32 once, then clamped to 0..1 like the original,
    sizes too.
    """
    image = recipe.image_size
    sizes = [round(size * image, 2) for size in recipe.prior_sizes]
    priors = []
    levels = zip(recipe.prior_maps, recipe.prior_steps, sizes[:-1], sizes[1:], strict=True)
    for cells, step, small, large in levels:
        side = small / image
        between = math.sqrt(side * (large / image))
        shapes = [(side, side), (between, between)]
        for ratio in map(math.sqrt, recipe.prior_ratios):
            shapes += [(side * ratio, side / ratio), (side / ratio, side * ratio)]
        center = (torch.arange(cells, dtype=torch.float64) + 0.5) / (image / step)
        cy, cx = torch.meshgrid(center, center, indexing="ij")
        centers = torch.stack([cx, cy], dim=-1).unsqueeze(2).expand(-1, -1, len(shapes), -1)
        shaped = torch.tensor(shapes, dtype=torch.float64).expand(cells, cells, -1, -1)
        priors.append(torch.cat([centers, shaped], dim=-1).reshape(-1, 4))
    return torch.cat(priors).float().clamp_(0, 1)


def priors_per_cell(recipe: Recipe) -> int:
    """Number of prior shapes of a cell, the same on all maps."""
    return 2 + 2 * len(recipe.prior_ratios)


def to_ltrb(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre form to corner form."""
    center, half = boxes_cxcywh[..., :2], 0.5 * boxes_cxcywh[..., 2:]
    return torch.cat([center - half, center + half], dim=-1)


def to_cxcywh(boxes_ltrb: Tensor) -> Tensor:
    """(..., 4) corner form to centre form."""
    low, high = boxes_ltrb[..., :2], boxes_ltrb[..., 2:]
    return torch.cat([0.5 * (low + high), high - low], dim=-1)


def encode(boxes_cxcywh: Tensor, anchors_cxcywh: Tensor, recipe: Recipe) -> Tensor:
    """Offsets (..., 4) of boxes to their priors; SSD paper equation 2, with variances.

    Sizes below 1e-7 are raised to it: the logarithm of a vanishing box would be infinite.
    """
    center, size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    shift = (boxes_cxcywh[..., :2] - center) / (size * recipe.center_variance)
    scale = (boxes_cxcywh[..., 2:].clamp(min=1e-7) / size).log() / recipe.size_variance
    return torch.cat([shift, scale], dim=-1)


def decode(offsets: Tensor, anchors_cxcywh: Tensor, recipe: Recipe) -> Tensor:
    """Boxes (..., 4) `cxcywh` from offsets: the inverse of `encode`, not clipped."""
    center, size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    moved = offsets[..., :2] * recipe.center_variance * size + center
    scaled = (offsets[..., 2:] * recipe.size_variance).exp() * size
    return torch.cat([moved, scaled], dim=-1)
