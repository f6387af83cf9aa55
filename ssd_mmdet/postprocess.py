"""Raw outputs to detections: softmax, decoding, NMS per class (SSD paper section 2.2)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.nms import class_nms
from ssd_mmdet.anchors import decode, make_anchors
from ssd_mmdet.config import Recipe


class Detections(NamedTuple):
    """Detections of one image on the host, best first."""

    boxes: Tensor  # (n, 4) float32 xyxy, pixels of the original image, clipped to it
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int64 0-based classes


@torch.no_grad()
def decode_outputs(
    outputs: tuple[Tensor, Tensor], anchors: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Boxes (N, P, 4) xyxy in pixels of the network input, clipped, and probabilities
    (N, P, classes), background left out."""
    offsets, logits = (output.float() for output in outputs)
    boxes = decode(offsets, anchors, recipe)
    return boxes, logits.softmax(dim=-1)[..., :-1].contiguous()


@torch.no_grad()
def detect(outputs: tuple[Tensor, Tensor], sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Detections of N images; `sizes` (N, 2) are the original (height, width) in pixels.

    Every pair of anchor and class that scores above `score_threshold` enters greedy NMS of its
    class, in fp32, in pixels of the original image; the `max_detections` best survivors are
    returned.
    """
    anchors = make_anchors(recipe).to(outputs[0].device)
    boxes, scores = (part.cpu().numpy() for part in decode_outputs(outputs, anchors, recipe))
    found = []
    for image_boxes, image_scores, (height, width) in zip(
        boxes, scores, sizes.tolist(), strict=True
    ):
        # Flat: numpy's nonzero of two axes takes several times as long.
        passed = np.flatnonzero(image_scores > recipe.score_threshold)
        rows, labels = np.divmod(passed, image_scores.shape[1])
        passed = image_scores.reshape(-1)[passed]
        scale = recipe.image_size / np.array([width, height, width, height], np.float32)
        pixels = image_boxes[rows] / scale
        keep = class_nms(pixels, passed, labels, recipe.nms_iou, recipe.max_detections)
        parts = pixels[keep], passed[keep], labels[keep]
        found.append(Detections(*map(torch.from_numpy, parts)))
    return found
