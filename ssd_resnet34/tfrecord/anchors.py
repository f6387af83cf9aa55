"""Default boxes and box coding of the TFRecord recipe, in corner form; a code is (ty, tx, th, tw).

The boxes are the first recipe's in another order. Their corners are rounded once, from double
precision, and centres and sizes follow from the corners: which default box is the best for a small
object hangs on the last bit.
"""

import math

import torch
from torch import Tensor

from ssd_resnet34 import anchors as first
from ssd_resnet34.anchors import to_cxcywh, to_ltrb
from ssd_resnet34.tfrecord.config import Recipe

EPSILON = 1e-8  # added to every size before coding


def default_boxes(recipe: Recipe) -> Tensor:
    """Default boxes (8732, 4) float64 `cxcywh`, clipped to 0..1: map, row, column, shape."""
    size = recipe.image_size
    levels = zip(
        recipe.prior_maps,
        recipe.prior_steps,
        recipe.prior_sizes[:-1],
        recipe.prior_sizes[1:],
        recipe.prior_ratios,
        strict=True,
    )
    boxes = []
    for cells, step, small, large, ratios in levels:
        between = math.sqrt(small * large)
        shapes = [(small, small), (between, between)]
        for ratio in ratios:
            wide, narrow = small * math.sqrt(ratio), small / math.sqrt(ratio)
            shapes += [(wide, narrow), (narrow, wide)]
        center = (torch.arange(cells, dtype=torch.float64) + 0.5) * step
        cy, cx = torch.meshgrid(center, center, indexing="ij")
        centers = torch.stack([cx, cy], dim=-1).reshape(-1, 1, 2).expand(-1, len(shapes), 2)
        sizes = torch.tensor(shapes, dtype=torch.float64).expand(cells * cells, -1, 2)
        boxes.append(torch.cat([centers, sizes], dim=-1).reshape(-1, 4) / size)
    return torch.cat(boxes).clamp_(0, 1)


def make_anchors(recipe: Recipe) -> Tensor:
    """Default boxes (8732, 4) float32 `ltrb`, not clipped, in the order of the raw outputs."""
    return to_ltrb(default_boxes(recipe)).float()


def encode(boxes_ltrb: Tensor, anchors_ltrb: Tensor, recipe: Recipe) -> Tensor:
    """Codes (..., 4) `ty, tx, th, tw` of boxes relative to their default boxes."""
    boxes, anchors = to_cxcywh(boxes_ltrb), to_cxcywh(anchors_ltrb)
    size, anchor_size = boxes[..., 2:] + EPSILON, anchors[..., 2:] + EPSILON
    shift = (boxes[..., :2] - anchors[..., :2]) / anchor_size / recipe.center_variance
    scale = (size / anchor_size).log() / recipe.size_variance
    return _swapped(torch.cat([shift, scale], dim=-1))


def decode(codes: Tensor, anchors_ltrb: Tensor, recipe: Recipe) -> Tensor:
    """Boxes (..., 4) `ltrb` of codes: the inverse of `encode`, without its epsilon, not clipped."""
    return to_ltrb(first.decode(_swapped(codes), to_cxcywh(anchors_ltrb), recipe))


def _swapped(pairs: Tensor) -> Tensor:
    """(y, x, h, w) to (x, y, w, h) and back."""
    return pairs.unflatten(-1, (2, 2)).flip(-1).flatten(-2)
