"""Raw outputs to detections: softmax, decoding and NMS by class (SSD paper, section 2.2)."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.detections import Detections
from common.coco.nms import class_nms
from common.npu.device import in_host_memory
from common.npu.operators import largest
from common.npu.overlap import HostCopy
from ssd_mmdet.anchors import decode, make_anchors
from ssd_mmdet.config import Recipe

MAX_DEVICE_CANDIDATES = 4096  # of each image, those that an accelerator sends to the host first


class Candidates(NamedTuple):
    """Pairs of anchor and class of one image that score above the threshold, on the host."""

    boxes: np.ndarray  # (n, 4) float32 xyxy, pixels of the network input
    scores: np.ndarray  # (n,) float32
    labels: np.ndarray  # (n,) int64


class Started(NamedTuple):
    """What `start_detect` has issued for N images."""

    boxes: Tensor  # (N, P, 4) float32 xyxy, pixels of the network input
    scores: Tensor  # (N, P, classes) float32
    best: HostCopy | None  # `best_candidates` of an accelerator


@torch.no_grad()
def decode_outputs(
    outputs: tuple[Tensor, Tensor], anchors: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Return boxes (N, P, 4) and scores (N, P, classes) of raw outputs, in fp32.

    Boxes are xyxy in pixels of the network input, clipped to it. Scores are the probabilities of
    all classes but the background.
    """
    deltas, logits = outputs
    boxes = decode(deltas.float(), anchors, recipe)
    scores = logits.float().softmax(dim=-1)[..., :-1]
    return boxes, scores


@torch.no_grad()
def detect(outputs: tuple[Tensor, Tensor], sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Return the detections of N images, whose original (height, width) are `sizes` (N, 2).

    All pairs of anchor and class that score above `score_threshold` enter the greedy NMS of their
    class, in fp32 and in pixels of the original image. The `max_detections` best survivors are
    returned.
    """
    return finish_detect(start_detect(outputs, recipe), sizes, recipe)


@torch.no_grad()
def start_detect(outputs: tuple[Tensor, Tensor], recipe: Recipe) -> Started:
    """Issue the device's part of `detect`: steps of fixed shapes, for which nothing waits."""
    anchors = anchors_on(outputs[0].device, recipe)
    boxes, scores = decode_outputs(outputs, anchors, recipe)
    if in_host_memory(scores.device):
        return Started(boxes, scores, best=None)
    return Started(boxes, scores, best=HostCopy(best_candidates(boxes, scores, recipe)))


@torch.no_grad()
def finish_detect(started: Started, sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Do the host's part of `detect`, once the copies from the device are there."""
    boxes, scores, _ = started
    detections = []
    for index, image_candidates in enumerate(candidates(started, recipe)):
        size = sizes[index].tolist()
        image_detections = suppress(image_candidates, size, recipe)
        # A candidate is dropped because of a better one only. So the best candidates are enough if
        # they fill the list; if they do not, all of them are needed.
        may_have_more = len(image_candidates.scores) == MAX_DEVICE_CANDIDATES
        if may_have_more and len(image_detections.scores) < recipe.max_detections:
            image_candidates = host_candidates(boxes[index].cpu(), scores[index].cpu(), recipe)
            image_detections = suppress(image_candidates, size, recipe)
        detections.append(image_detections)
    return detections


@functools.cache
def anchors_on(device: torch.device, recipe: Recipe) -> Tensor:
    """Return the anchors (P, 4) xyxy on a device, where they stay for the next call."""
    return make_anchors(recipe).to(device)


def candidates(started: Started, recipe: Recipe) -> list[Candidates]:
    """Return the candidates of each image; of an accelerator's, the best ones only."""
    image_candidates = []
    if started.best is None:
        for image_boxes, image_scores in zip(started.boxes, started.scores, strict=True):
            image_candidates.append(host_candidates(image_boxes, image_scores, recipe))
        return image_candidates
    classes = started.scores.shape[2]
    for rows in started.best.wait().numpy():
        image_candidates.append(unpack_candidates(rows, classes))
    return image_candidates


def host_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Candidates:
    """Return all candidates among boxes (P, 4) and scores (P, classes) of one image."""
    boxes = boxes.numpy()
    scores = scores.numpy()
    # Flat, because numpy's nonzero of two axes takes several times as long.
    passed = np.flatnonzero(scores > recipe.score_threshold)
    anchor, label = np.divmod(passed, scores.shape[1])
    return Candidates(boxes[anchor], scores[anchor, label], label)


def best_candidates(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Tensor:
    """Return the best candidates among boxes (N, P, 4) and scores (N, P, classes) of N images.

    They are chosen on the device, in operations of fixed shapes. The rows (N, count, 6) are a box,
    its score, which is 0 for no candidate, and its position among the scores.
    """
    classes = scores.shape[2]
    passed_scores = torch.where(scores > recipe.score_threshold, scores, 0.0).flatten(1)
    count = min(MAX_DEVICE_CANDIDATES, passed_scores.shape[1])
    best_scores, position = largest(passed_scores, count)  # (N, count)
    anchor = (position.int() // classes).long()
    best_boxes = boxes.gather(1, anchor.unsqueeze(-1).expand(-1, -1, 4))
    # A position is exact as float32 below 2**24.
    scores_and_positions = torch.stack([best_scores, position.float()], dim=-1)
    return torch.cat([best_boxes, scores_and_positions], dim=2)


def unpack_candidates(rows: np.ndarray, classes: int) -> Candidates:
    """Return the candidates among the rows (count, 6) of one image."""
    rows = rows[rows[:, 4] > 0]
    # As on the host: in the order of the anchors, whichever order the device's topk has.
    rows = rows[rows[:, 5].argsort()]
    labels = rows[:, 5].astype(np.int64) % classes
    return Candidates(boxes=rows[:, :4], scores=rows[:, 4], labels=labels)


def suppress(image_candidates: Candidates, size: list[int], recipe: Recipe) -> Detections:
    """Apply NMS to the candidates of an image whose original size is (height, width)."""
    height, width = size
    scale = recipe.image_size / np.array([width, height, width, height], np.float32)
    boxes = image_candidates.boxes / scale
    scores = image_candidates.scores
    labels = image_candidates.labels
    keep = class_nms(boxes, scores, labels, recipe.nms_iou, recipe.max_detections)
    return Detections(
        boxes=torch.from_numpy(boxes[keep]),
        scores=torch.from_numpy(scores[keep]),
        labels=torch.from_numpy(labels[keep]),
    )
