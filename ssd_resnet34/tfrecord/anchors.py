"""Anchors and box coding of the TFRecord recipe.

The anchors are those of the COCO recipe in another order: feature map, row, column, shape. Boxes
are normalised to the image, in one of two forms: `cxcywh` (centre and size) and `xyxy` (corners).
Deltas are `(ty, tx, th, tw)`, the order of the TensorFlow port.

As there, the corners are rounded once, from double precision, and centres and sizes are computed
from the rounded corners: the last bit decides which anchor fits a small object best.
"""

import torch
from torch import Tensor

from ssd_resnet34 import anchors as coco_anchors
from ssd_resnet34.anchors import anchors_of_map, anchors_per_cell, to_cxcywh, to_xyxy
from ssd_resnet34.tfrecord.config import Recipe

EPSILON = 1e-8  # added to every size before coding


def make_anchors(recipe: Recipe) -> Tensor:
    """Return the anchors (8732, 4) float32 `xyxy`, not clipped, in the order of the raw outputs."""
    return to_xyxy(make_anchors_cxcywh(recipe)).float()


def make_anchors_cxcywh(recipe: Recipe) -> Tensor:
    """Return the anchors (8732, 4) float64 `cxcywh`, clipped to 0..1."""
    anchors = []
    for level, num_shapes in enumerate(anchors_per_cell(recipe)):
        by_shape = anchors_of_map(recipe, level).unflatten(0, (num_shapes, -1))
        by_cell = by_shape.transpose(0, 1)
        anchors.append(by_cell.flatten(0, 1))
    return torch.cat(anchors).clamp_(0, 1)


def encode(boxes_xyxy: Tensor, anchors_xyxy: Tensor, recipe: Recipe) -> Tensor:
    """Return the deltas (..., 4) of boxes relative to their anchors; SSD paper equation 2."""
    boxes = to_cxcywh(boxes_xyxy)
    anchors = to_cxcywh(anchors_xyxy)
    box_sizes = boxes[..., 2:] + EPSILON
    anchor_sizes = anchors[..., 2:] + EPSILON
    center_deltas = (boxes[..., :2] - anchors[..., :2]) / anchor_sizes / recipe.center_variance
    size_deltas = (box_sizes / anchor_sizes).log() / recipe.size_variance
    return _swap_x_and_y(torch.cat([center_deltas, size_deltas], dim=-1))


def decode(deltas: Tensor, anchors_xyxy: Tensor, recipe: Recipe) -> Tensor:
    """Return the boxes (..., 4) `xyxy` of deltas, not clipped.

    This is the inverse of `encode` but for the epsilon, which the TensorFlow port leaves out here.
    """
    boxes = coco_anchors.decode(_swap_x_and_y(deltas), to_cxcywh(anchors_xyxy), recipe)
    return to_xyxy(boxes)


def _swap_x_and_y(deltas: Tensor) -> Tensor:
    """Turn (ty, tx, th, tw) into (tx, ty, tw, th), and back."""
    # Not unflatten, which has no counterpart in ONNX before operator set 13.
    pairs = deltas.reshape(*deltas.shape[:-1], 2, 2)
    return pairs.flip(-1).flatten(-2)
