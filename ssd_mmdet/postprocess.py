"""Raw outputs to detections: softmax, decoding, NMS per class (SSD paper section 2.2)."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.nms import class_nms
from ssd_mmdet.anchors import decode, make_anchors
from ssd_mmdet.config import Recipe

BEST = 4096  # candidates of an image that an accelerator sends to the host at first


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
    return boxes, logits.softmax(dim=-1)[..., :-1]


@functools.cache
def _anchors(recipe: Recipe, device: torch.device) -> Tensor:
    return make_anchors(recipe).to(device)


@torch.no_grad()
def detect(outputs: tuple[Tensor, Tensor], sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Detections of N images; `sizes` (N, 2) are the original (height, width) in pixels.

    Every pair of anchor and class that scores above `score_threshold` enters greedy NMS of its
    class, in fp32, in pixels of the original image; the `max_detections` best survivors are
    returned.
    """
    anchors = _anchors(recipe, outputs[0].device)
    boxes, scores = decode_outputs(outputs, anchors, recipe)
    found = []
    for n, image in enumerate(candidates(boxes, scores, recipe)):
        detections = _survivors(*image, sizes[n].tolist(), recipe)
        # Only better ones decide about a candidate: the best are enough if they fill the list.
        if len(image[1]) == BEST and len(detections.scores) < recipe.max_detections:
            (image,) = sparse_candidates(boxes[n : n + 1].cpu(), scores[n : n + 1].cpu(), recipe)
            detections = _survivors(*image, sizes[n].tolist(), recipe)
        found.append(detections)
    return found


def candidates(boxes: Tensor, scores: Tensor, recipe: Recipe):
    """Boxes (n, 4), scores and labels (n,) above `score_threshold` of each image, on the host; of
    an accelerator's the `BEST` best."""
    way = sparse_candidates if scores.device.type == "cpu" else dense_candidates
    return way(boxes, scores, recipe)


def _survivors(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, size: list[int], recipe: Recipe
) -> Detections:
    """NMS of the candidates of an image of `size` (height, width)."""
    height, width = size
    boxes = boxes / (recipe.image_size / np.array([width, height, width, height], np.float32))
    keep = class_nms(boxes, scores, labels, recipe.nms_iou, recipe.max_detections)
    return Detections(*(torch.from_numpy(part[keep]) for part in (boxes, scores, labels)))


def sparse_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe):
    """All candidates, on the host: few scores pass the threshold, so look at those only."""
    for image_boxes, image_scores in zip(boxes.numpy(), scores.numpy(), strict=True):
        # Flat: numpy's nonzero of two axes takes several times as long.
        passed = np.flatnonzero(image_scores > recipe.score_threshold)
        rows, labels = np.divmod(passed, image_scores.shape[1])
        yield image_boxes[rows], image_scores[rows, labels], labels


def dense_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe):
    """The best candidates, by fixed-shape steps on the device, brought over in one copy."""
    classes = scores.shape[2]
    passed = torch.where(scores > recipe.score_threshold, scores, 0.0).flatten(1)
    best, place = passed.topk(min(BEST, passed.shape[1]), dim=1)
    rows = torch.div(place, classes, rounding_mode="floor")
    labels = (place - rows * classes).float()
    index = rows.unsqueeze(-1).expand(-1, -1, 4)
    packed = torch.cat([boxes.gather(1, index), torch.stack([best, labels], dim=-1)], dim=2)
    for image in packed.cpu().numpy():
        image = image[image[:, 4] > 0]
        yield image[:, :4], image[:, 4], image[:, 5].astype(np.int64)
