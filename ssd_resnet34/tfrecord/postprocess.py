"""From raw outputs to detections: softmax, decoding, repair of boxes, NMS for each class."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from common.coco.nms import class_nms
from common.npu.device import in_host_memory
from ssd_resnet34.postprocess import Detections, device_candidates, host_candidates
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
    anchors = anchors_on(outputs[0].device, recipe)
    boxes, scores = decode_outputs(outputs, anchors, recipe)
    if recipe.clamp_boxes:
        boxes = clamp_boxes(boxes)
    if in_host_memory(scores.device):
        candidates_of_images = host_candidates(boxes, scores, recipe)
    else:
        candidates_of_images = device_candidates(boxes, scores, recipe)

    # class_nms drops a box whose IoU is greater than its threshold; here equality is enough.
    nms_iou = math.nextafter(recipe.nms_iou, 0)
    detections = []
    for candidates, (height, width) in zip(candidates_of_images, sizes.tolist(), strict=True):
        keep = class_nms(
            candidates.boxes,
            candidates.scores,
            candidates.labels,
            nms_iou,
            recipe.max_detections,
        )
        pixels = np.array([width, height, width, height], dtype=np.float32)
        of_image = Detections(
            boxes=torch.from_numpy(candidates.boxes[keep] * pixels),
            scores=torch.from_numpy(candidates.scores[keep]),
            labels=torch.from_numpy(candidates.labels[keep]),
        )
        detections.append(of_image)
    return detections


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
