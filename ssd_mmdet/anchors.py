"""Anchors and box coding: pure functions of the recipe. Boxes are xyxy, pixels of the input."""

import math

import torch
from torch import Tensor

from ssd_mmdet.config import Recipe


def make_anchors(recipe: Recipe) -> Tensor:
    """Anchors (8732, 4) float32 xyxy, in the order of the raw outputs: map, row, column, shape.

    As in MMDetection they are centred on their cells (stride / 2 first) and not clipped.
    """
    anchors = []
    levels = zip(
        recipe.anchor_maps,
        recipe.anchor_strides,
        recipe.anchor_sizes[:-1],
        recipe.anchor_sizes[1:],
        recipe.anchor_ratios,
        strict=True,
    )
    for cells, stride, small, large, ratios in levels:
        between = math.sqrt(small * large)
        shapes = [(small, small), (between, between)]
        for ratio in ratios:
            long, short = small * math.sqrt(ratio), small / math.sqrt(ratio)
            shapes += [(long, short), (short, long)]  # the wide one first
        center = (torch.arange(cells) + 0.5) * stride
        cy, cx = torch.meshgrid(center, center, indexing="ij")
        centers = torch.stack([cx, cy], dim=-1).unsqueeze(2)  # (row, column, 1, 2)
        half = torch.tensor(shapes) / 2
        anchors.append(torch.cat([centers - half, centers + half], dim=-1).reshape(-1, 4))
    return torch.cat(anchors)


def anchors_per_cell(recipe: Recipe) -> tuple[int, ...]:
    """Number of anchor shapes of each feature map."""
    return tuple(2 + 2 * len(ratios) for ratios in recipe.anchor_ratios)


def _center_and_size(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return (low + high) * 0.5, high - low


def encode(boxes_xyxy: Tensor, anchors_xyxy: Tensor, recipe: Recipe) -> Tensor:
    """Offsets (..., 4) of boxes to their anchors; SSD paper equation 2, with variances.

    Sizes below 1e-7 are raised to it: the logarithm of a vanishing box would be infinite.
    """
    center, size = _center_and_size(boxes_xyxy)
    anchor_center, anchor_size = _center_and_size(anchors_xyxy)
    shift = (center - anchor_center) / anchor_size / recipe.center_variance
    scale = (size.clamp(min=1e-7) / anchor_size).log() / recipe.size_variance
    return torch.cat([shift, scale], dim=-1)


def decode(offsets: Tensor, anchors_xyxy: Tensor, recipe: Recipe) -> Tensor:
    """Boxes (..., 4) xyxy from offsets: the inverse of `encode`, sizes limited to
    `size_ratio_limit` times the anchor's and its inverse, clipped to the network input."""
    anchor_center, anchor_size = _center_and_size(anchors_xyxy)
    center = offsets[..., :2] * recipe.center_variance * anchor_size + anchor_center
    limit = math.log(recipe.size_ratio_limit)
    scale = (offsets[..., 2:] * recipe.size_variance).clamp(-limit, limit)
    half = scale.exp() * anchor_size * 0.5
    boxes = torch.cat([center - half, center + half], dim=-1)
    return boxes.clamp_(0, recipe.image_size)
