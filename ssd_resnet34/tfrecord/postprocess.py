"""Raw outputs to detections of the TFRecord recipe: softmax, decoding, NMS per class."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from common.coco.nms import class_nms
from ssd_resnet34.postprocess import Detections, dense_candidates, sparse_candidates
from ssd_resnet34.tfrecord.anchors import decode, make_anchors
from ssd_resnet34.tfrecord.config import Recipe

SMALLEST = 1e-5  # of the image's side: what the port makes of a side below 0, and of no extent


@torch.no_grad()
def decode_outputs(
    outputs: tuple[Tensor, Tensor], anchors: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Boxes (N, P, 4) normalised ltrb and probabilities (N, classes, P), background left out."""
    codes, logits = (output.float() for output in outputs)
    boxes = decode(codes.transpose(1, 2), anchors, recipe)
    return boxes, logits.softmax(dim=1)[:, 1:]


@functools.cache
def _anchors(recipe: Recipe, device: torch.device) -> Tensor:
    return make_anchors(recipe).to(device)


@torch.no_grad()
def detect(outputs: tuple[Tensor, Tensor], sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Detections of N images; `sizes` (N, 2) are the original (height, width) in pixels.

    Per class the `max_per_class` best scores above `score_threshold` enter greedy NMS in
    normalised coordinates, in fp32; of what survives, the `max_detections` best are returned.
    """
    anchors = _anchors(recipe, outputs[0].device)
    boxes, scores = decode_outputs(outputs, anchors, recipe)
    if recipe.clamp_boxes:
        boxes = _clamped(boxes)
    candidates = sparse_candidates if scores.device.type == "cpu" else dense_candidates
    # The shared NMS drops what overlaps by more: here by as much already.
    nms_iou = math.nextafter(recipe.nms_iou, 0)
    found = []
    for size, image in zip(sizes.tolist(), candidates(boxes, scores, recipe), strict=True):
        image_boxes, image_scores, image_labels = image
        keep = class_nms(image_boxes, image_scores, image_labels, nms_iou, recipe.max_detections)
        height, width = size
        scale = np.array([width, height, width, height], np.float32)
        found.append(
            Detections(
                torch.from_numpy(image_boxes[keep] * scale),
                torch.from_numpy(image_scores[keep]),
                torch.from_numpy(image_labels[keep]),
            )
        )
    return found


def _clamped(boxes: Tensor) -> Tensor:
    """The port's repair: no side below 0, no box without extent; above 1 is left alone."""
    boxes = torch.where(boxes < 0, SMALLEST, boxes)
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([low, torch.where(high <= low, low + SMALLEST, high)], dim=-1)
