"""Raw outputs to detections: softmax, decoding, NMS per class (SSD paper section 2.2)."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.nms import class_nms
from ssd_resnet34.anchors import decode, make_anchors, to_xyxy
from ssd_resnet34.config import Recipe


class Detections(NamedTuple):
    """Detections of one image on the host, best first."""

    boxes: Tensor  # (n, 4) float32 xyxy, pixels of the original image, not clipped
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int64 0-based classes


@torch.no_grad()
def decode_outputs(
    outputs: tuple[Tensor, Tensor], anchors: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Boxes (N, P, 4) normalised ltrb and probabilities (N, classes, P), background left out."""
    offsets, logits = (output.float() for output in outputs)
    boxes = to_xyxy(decode(offsets.transpose(1, 2), anchors, recipe))
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
    candidates = sparse_candidates if scores.device.type == "cpu" else dense_candidates
    found = []
    for size, image in zip(sizes.tolist(), candidates(boxes, scores, recipe), strict=True):
        image_boxes, image_scores, image_labels = image
        keep = class_nms(
            image_boxes, image_scores, image_labels, recipe.nms_iou, recipe.max_detections
        )
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


def sparse_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe):
    """Candidates on the host: few scores pass the threshold, so look at those only."""
    for image_boxes, image_scores in zip(boxes.numpy(), scores.numpy(), strict=True):
        # Flat: numpy's nonzero of two axes takes several times as long.
        passed = np.flatnonzero(image_scores > recipe.score_threshold)
        labels, priors = np.divmod(passed, image_scores.shape[1])
        passed = image_scores[labels, priors]
        counts = np.bincount(labels, minlength=len(image_scores))
        if counts.max(initial=0) > recipe.max_per_class:
            order = np.lexsort((-passed, labels))
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            order = order[np.arange(len(order)) - starts < recipe.max_per_class]
            labels, priors, passed = labels[order], priors[order], passed[order]
        yield image_boxes[priors], passed, labels


def dense_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe):
    """The same candidates by fixed-shape steps on the device, brought over in one copy."""
    count = min(recipe.max_per_class, scores.shape[2])
    best, priors = scores.topk(count, dim=2)  # (N, classes, K)
    index = priors.flatten(1).unsqueeze(-1).expand(-1, -1, 4)
    packed = torch.cat([boxes.gather(1, index), best.flatten(1).unsqueeze(-1)], dim=2).cpu()
    labels = np.repeat(np.arange(scores.shape[1]), count)
    for image in packed.numpy():
        passed = image[:, 4] > recipe.score_threshold
        yield image[passed, :4], image[passed, 4], labels[passed]
