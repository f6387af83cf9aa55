"""From raw outputs to detections: softmax, decoding, NMS for each class (SSD paper section 2.2)."""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.detections import Detections
from common.coco.nms import class_nms
from common.npu.device import in_host_memory
from common.npu.operators import largest
from common.npu.overlap import HostCopy
from ssd_resnet34.anchors import decode, make_anchors, to_xyxy
from ssd_resnet34.config import Recipe


class Candidates(NamedTuple):
    """The n boxes of one image that enter NMS, on the host."""

    boxes: np.ndarray  # (n, 4) float32 normalised xyxy
    scores: np.ndarray  # (n,) float32
    labels: np.ndarray  # (n,) int64 0-based classes


class Started(NamedTuple):
    """What `start_detect` has issued for N images."""

    boxes: Tensor  # (N, P, 4) float32 normalised xyxy
    scores: Tensor  # (N, classes, P) float32
    best: HostCopy | None  # `best_candidates` of an accelerator


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
    return start_candidates(boxes, scores, recipe)


def start_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Started:
    """Issue the choice of candidates among boxes (N, P, 4) and scores (N, classes, P)."""
    if in_host_memory(scores.device):
        return Started(boxes, scores, best=None)
    return Started(boxes, scores, best=HostCopy(best_candidates(boxes, scores, recipe)))


def finish_detect(started: Started, sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Do the host's part of `detect`, once the copies from the device are there."""
    return suppress(candidates(started, recipe), sizes, recipe.nms_iou, recipe.max_detections)


def suppress(
    candidates_of_images: Iterable[Candidates], sizes: Tensor, nms_iou: float, max_detections: int
) -> list[Detections]:
    """Apply NMS to the candidates of N images; `sizes` as in `detect`."""
    detections = []
    for of_image, (height, width) in zip(candidates_of_images, sizes.tolist(), strict=True):
        keep = class_nms(of_image.boxes, of_image.scores, of_image.labels, nms_iou, max_detections)
        pixels = np.array([width, height, width, height], dtype=np.float32)
        detections.append(
            Detections(
                boxes=torch.from_numpy(of_image.boxes[keep] * pixels),
                scores=torch.from_numpy(of_image.scores[keep]),
                labels=torch.from_numpy(of_image.labels[keep]),
            )
        )
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


def candidates(started: Started, recipe: Recipe) -> Iterator[Candidates]:
    """Select the candidates of each image, the same ones on every device."""
    if started.best is None:
        return host_candidates(started.boxes, started.scores, recipe)
    return unpack_candidates(started.best.wait().numpy(), started.scores.shape[1], recipe)


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


def best_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Tensor:
    """Return the `max_per_class` best anchors of each class, chosen in operations of fixed shapes.

    The rows (N, classes * max_per_class, 6) are a box, its score and the position of its anchor.
    """
    limit = min(recipe.max_per_class, scores.shape[2])
    best_scores, anchors = largest(scores, limit)  # (N, classes, limit)
    anchors = anchors.flatten(1)
    best_boxes = boxes.gather(1, anchors.unsqueeze(-1).expand(-1, -1, 4))
    # A position is exact as float32 below 2**24.
    scores_and_anchors = torch.stack([best_scores.flatten(1), anchors.float()], dim=2)
    return torch.cat([best_boxes, scores_and_anchors], dim=2)


def unpack_candidates(packed: np.ndarray, num_classes: int, recipe: Recipe) -> Iterator[Candidates]:
    """Select the candidates of each image among its rows of `best_candidates`."""
    limit = packed.shape[1] // num_classes
    labels = np.repeat(np.arange(num_classes), limit)
    for rows in packed:
        passes = rows[:, 4] > recipe.score_threshold
        rows = rows[passes]
        passing_labels = labels[passes]
        # As on the host, whichever of equals the device's topk names first.
        order = np.lexsort((rows[:, 5], -rows[:, 4], passing_labels))
        rows = rows[order]
        yield Candidates(rows[:, :4], rows[:, 4], passing_labels[order])
