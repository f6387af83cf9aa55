"""Default boxes ("priors") and box coding: pure functions of the recipe.

Two box forms, both normalised to the image: `cxcywh` (centre and size) and `ltrb` (corners).
"""

import math

import torch
from torch import Tensor

from ssd_resnet34.config import Recipe


def make_anchors(recipe: Recipe) -> Tensor:
    """Priors (8732, 4) float32 `cxcywh`, in the order of the raw outputs: map, shape, row, column.

    Computed in double precision and clamped to 0..1 like the original, which moves the outer
    centres of the 10x10 map inside.
    """
    size = recipe.image_size
    priors = []
    levels = zip(
        recipe.anchor_maps,
        recipe.anchor_steps,
        recipe.anchor_sizes[:-1],
        recipe.anchor_sizes[1:],
        recipe.anchor_ratios,
        strict=True,
    )
    for cells, step, small, large, ratios in levels:
        between = math.sqrt(small * large)
        shapes = [(small, small), (between, between)]
        for ratio in ratios:
            wide, narrow = small * math.sqrt(ratio), small / math.sqrt(ratio)
            shapes += [(wide, narrow), (narrow, wide)]
        center = (torch.arange(cells, dtype=torch.float64) + 0.5) * step / size
        cy, cx = torch.meshgrid(center, center, indexing="ij")
        for w, h in shapes:
            box = [cx, cy, torch.full_like(cx, w / size), torch.full_like(cx, h / size)]
            priors.append(torch.stack(box, dim=-1).reshape(-1, 4))
    return torch.cat(priors).float().clamp_(0, 1)


def anchors_per_cell(recipe: Recipe) -> tuple[int, ...]:
    """Number of prior shapes of each feature map."""
    return tuple(2 + 2 * len(ratios) for ratios in recipe.anchor_ratios)


def to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
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
    shift = (boxes_cxcywh[..., :2] - center) / size / recipe.center_variance
    scale = (boxes_cxcywh[..., 2:].clamp(min=1e-7) / size).log() / recipe.size_variance
    return torch.cat([shift, scale], dim=-1)


def decode(offsets: Tensor, anchors_cxcywh: Tensor, recipe: Recipe) -> Tensor:
    """Boxes (..., 4) `cxcywh` from offsets: the inverse of `encode`, not clipped."""
    center, size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    moved = offsets[..., :2] * recipe.center_variance * size + center
    scaled = (offsets[..., 2:] * recipe.size_variance).exp() * size
    return torch.cat([moved, scaled], dim=-1)
