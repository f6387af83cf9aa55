"""From raw outputs to detections: softmax, decoding, repair of boxes, NMS for each class."""

import functools
import math

import torch
from torch import Tensor

from ssd_resnet34.postprocess import (
    Detections,
    Started,
    candidates,
    start_candidates,
    suppress,
)
from ssd_resnet34.tfrecord.anchors import decode, make_anchors
from ssd_resnet34.tfrecord.config import Recipe

# Of a coordinate below 0 and of an empty side, in parts of the image, as in the TensorFlow port.
CLAMPED_VALUE = 1e-5


@torch.no_grad()
def detect(outputs: tuple[Tensor, Tensor], sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Return the detections of N images, whose original (height, width) in pixels `sizes` holds.

    In each class the `max_per_class` best scores above `score_threshold` enter greedy NMS, in
    normalised coordinates and fp32. Of its survivors the `max_detections` best of an image count.
    """
    return finish_detect(start_detect(outputs, recipe), sizes, recipe)


@torch.no_grad()
def start_detect(outputs: tuple[Tensor, Tensor], recipe: Recipe) -> Started:
    """Issue the device's part of `detect`: steps of fixed shapes, for which nothing waits."""
    anchors = anchors_on(outputs[0].device, recipe)
    boxes, scores = decode_outputs(outputs, anchors, recipe)
    if recipe.clamp_boxes:
        boxes = clamp_boxes(boxes)
    return start_candidates(boxes, scores, recipe)


def finish_detect(started: Started, sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Do the host's part of `detect`, once the copies from the device are there."""
    nms_iou = suppressing_iou(recipe)
    return suppress(candidates(started, recipe), sizes, nms_iou, recipe.max_detections)


def suppressing_iou(recipe: Recipe) -> float:
    """Return the IoU above which a box goes; here equality with `nms_iou` is enough for that."""
    return math.nextafter(recipe.nms_iou, 0)


@functools.cache
def anchors_on(device: torch.device, recipe: Recipe) -> Tensor:
    """Return the anchors (P, 4) xyxy on a device, where they stay for the next call."""
    return make_anchors(recipe).to(device)


@torch.no_grad()
def decode_outputs(
    outputs: tuple[Tensor, Tensor], anchors_xyxy: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Return boxes (N, P, 4) normalised xyxy and scores (N, classes, P), both fp32.

    Scores are probabilities; that of background is left out. `anchors_xyxy` are (P, 4).
    """
    deltas, logits = outputs
    boxes = decode(deltas.float().transpose(1, 2), anchors_xyxy, recipe)
    probabilities = logits.float().softmax(dim=1)
    return boxes, probabilities[:, 1:]


def clamp_boxes(boxes_xyxy: Tensor) -> Tensor:
    """Repair boxes (..., 4), normalised, as the TensorFlow port does.

    No coordinate is below 0 and no box is empty. Coordinates above 1 stay as they are.
    """
    boxes_xyxy = torch.where(boxes_xyxy < 0, CLAMPED_VALUE, boxes_xyxy)
    top_left = boxes_xyxy[..., :2]
    bottom_right = boxes_xyxy[..., 2:]
    bottom_right = torch.where(bottom_right <= top_left, top_left + CLAMPED_VALUE, bottom_right)
    return torch.cat([top_left, bottom_right], dim=-1)
