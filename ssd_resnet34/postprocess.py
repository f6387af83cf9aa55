"""From raw outputs to detections: softmax, decoding, NMS for each class (SSD paper section 2.2)."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.nms import class_nms
from common.npu.device import in_host_memory
from common.npu.operators import largest
from ssd_resnet34.anchors import decode, make_anchors, to_xyxy
from ssd_resnet34.config import Recipe


class Detections(NamedTuple):
    """The n detections of one image on the host, best first."""

    boxes: Tensor  # (n, 4) float32 xyxy, pixels of the original image, not clipped
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int64 0-based classes


class Candidates(NamedTuple):
    """The n boxes of one image that enter NMS, on the host."""

    boxes: np.ndarray  # (n, 4) float32 normalised xyxy
    scores: np.ndarray  # (n,) float32
    labels: np.ndarray  # (n,) int64 0-based classes


@torch.no_grad()
def detect(outputs: tuple[Tensor, Tensor], sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Return the detections of N images, whose original (height, width) in pixels `sizes` holds.

    In each class the `max_per_class` best scores above `score_threshold` enter greedy NMS, in
    normalised coordinates and fp32. Of its survivors the `max_detections` best of an image count.
    """
    anchors = anchors_on(outputs[0].device, recipe)
    boxes, scores = decode_outputs(outputs, anchors, recipe)
    if in_host_memory(scores.device):
        candidates_of_images = host_candidates(boxes, scores, recipe)
    else:
        candidates_of_images = device_candidates(boxes, scores, recipe)

    detections = []
    for candidates, (height, width) in zip(candidates_of_images, sizes.tolist(), strict=True):
        keep = class_nms(
            candidates.boxes,
            candidates.scores,
            candidates.labels,
            recipe.nms_iou,
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
    """Return the anchors (P, 4) `cxcywh` on a device, where they stay for the next call."""
    return make_anchors(recipe).to(device)


@torch.no_grad()
def decode_outputs(
    outputs: tuple[Tensor, Tensor], anchors: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Return boxes (N, P, 4) normalised xyxy and scores (N, classes, P), both fp32.

    Scores are probabilities; that of background is left out. `anchors` are (P, 4) `cxcywh`.
    """
    deltas, logits = outputs
    boxes = decode(deltas.float().transpose(1, 2), anchors, recipe)
    probabilities = logits.float().softmax(dim=1)
    return to_xyxy(boxes), probabilities[:, 1:]


def host_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Iterator[Candidates]:
    """Select the candidates of each image on the host, where few scores pass the threshold."""
    for image_boxes, image_scores in zip(boxes.numpy(), scores.numpy(), strict=True):
        # Of the flat array: np.nonzero of two axes takes several times as long.
        passing = np.flatnonzero(image_scores > recipe.score_threshold)
        labels, anchors = np.divmod(passing, image_scores.shape[1])
        passing_scores = image_scores[labels, anchors]
        best = best_of_each_class(passing_scores, labels, recipe.max_per_class)
        yield Candidates(image_boxes[anchors[best]], passing_scores[best], labels[best])


def best_of_each_class(scores: np.ndarray, labels: np.ndarray, limit: int) -> np.ndarray:
    """Return the indices of the `limit` highest scores of each class, class by class."""
    order = np.lexsort((-scores, labels))
    counts = np.bincount(labels)
    class_starts = np.cumsum(counts) - counts
    rank_in_class = np.arange(len(order)) - np.repeat(class_starts, counts)
    return order[rank_in_class < limit]


def device_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Iterator[Candidates]:
    """Select the same candidates on an accelerator: with fixed shapes, and one copy to the host."""
    num_classes, num_anchors = scores.shape[1:]
    limit = min(recipe.max_per_class, num_anchors)
    best_scores, anchors = largest(scores, limit)  # (N, classes, limit)
    anchors = anchors.flatten(1)
    best_boxes = boxes.gather(1, anchors.unsqueeze(-1).expand(-1, -1, 4))
    # A position is exact as float32 below 2**24.
    scores_and_anchors = torch.stack([best_scores.flatten(1), anchors.float()], dim=2)
    packed = torch.cat([best_boxes, scores_and_anchors], dim=2)  # (N, classes * limit, 6)
    labels = np.repeat(np.arange(num_classes), limit)
    for rows in packed.cpu().numpy():
        passes = rows[:, 4] > recipe.score_threshold
        rows = rows[passes]
        passing_labels = labels[passes]
        # As on the host, whichever of equals the device's topk names first.
        order = np.lexsort((rows[:, 5], -rows[:, 4], passing_labels))
        rows = rows[order]
        yield Candidates(rows[:, :4], rows[:, 4], passing_labels[order])
