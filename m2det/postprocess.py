"""Raw outputs to detections: softmax, decoding, soft-NMS or hard NMS of each class, clipping."""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.detections import Detections
from common.coco.nms import class_nms
from common.npu.overlap import HostCopy
from m2det.anchors import decode, make_anchors, to_xyxy
from m2det.config import Recipe

# Anchors of an image that are looked at first. Outputs of a trained network have some hundreds that
# can pass the score threshold.
FIRST_CANDIDATES = 4096
# Columns of `likeliest_candidates`.
NUM_PASSING = -2
POSITION = -1


class Started(NamedTuple):
    """What `start_detect` has issued for N images."""

    outputs: tuple[Tensor, Tensor]  # of the network
    likeliest: HostCopy  # see `likeliest_candidates`


@torch.no_grad()
def decode_outputs(
    outputs: tuple[Tensor, Tensor], anchors: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Return boxes (..., 4) normalised xyxy and probabilities (..., 1 + num_classes).

    Channel 0 is the background. `anchors` (..., 4) are `cxcywh`.
    """
    deltas, logits = outputs
    boxes = to_xyxy(decode(deltas.float(), anchors, recipe))
    return boxes, logits.float().softmax(dim=-1)


@torch.no_grad()
def detect(outputs: tuple[Tensor, Tensor], sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Return the detections of N images; `sizes` (N, 2) are the original (height, width) in pixels.

    All scores of a class above `score_threshold` enter NMS, in pixels and fp32; the first
    `max_per_class` survivors are kept, and of those of an image the `max_detections` best, unless
    that is 0. Boxes are clipped to the image last.
    """
    return finish_detect(start_detect(outputs, recipe), sizes, recipe)


@torch.no_grad()
def start_detect(outputs: tuple[Tensor, Tensor], recipe: Recipe) -> Started:
    """Issue the device's part of `detect`: steps of fixed shapes, for which nothing waits."""
    count = min(FIRST_CANDIDATES, outputs[0].shape[1])
    return Started(outputs, HostCopy(likeliest_candidates(outputs, count, recipe)))


@torch.no_grad()
def finish_detect(started: Started, sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Do the host's part of `detect`, once the copies from the device are there."""
    boxes, scores = candidates(started, recipe)
    detections = []
    for image, (height, width) in enumerate(sizes.tolist()):
        corner = np.array([width, height, width, height], np.float32)
        detections.append(suppress(boxes[image], scores[image], corner, recipe))
    return detections


# Boxes of a network that has not learned may be too large for a number, until they are clipped.
@np.errstate(over="ignore", invalid="ignore")
def suppress(
    boxes: np.ndarray, scores: np.ndarray, corner: np.ndarray, recipe: Recipe
) -> Detections:
    """Return the detections among K candidates of an image.

    `boxes` (K, 4) are normalised xyxy, `scores` (K, num_classes); `corner` (4,) is the image's
    width and height, twice.
    """
    # Class by class, and within a class in the order of the anchors.
    passes = scores > recipe.score_threshold
    labels, rows = np.nonzero(passes.T)
    boxes = boxes[rows] * corner
    scores = scores[rows, labels]

    # As in the original, the last pixel of a box counts as inside: x2 - x1 + 1 is its width.
    nms_boxes = boxes + np.array([0, 0, 1, 1], np.float32)
    if recipe.nms == "soft":
        kept, scores = soft_nms(
            nms_boxes,
            scores,
            labels,
            recipe.soft_nms_iou,
            recipe.soft_nms_min_score,
            recipe.max_per_class,
        )
    else:
        kept = class_nms(nms_boxes, scores, labels, recipe.hard_nms_iou)
        kept = kept[_rank_in_class(labels[kept]) < recipe.max_per_class]
        scores = scores[kept]

    best_first = np.lexsort((kept, -scores))  # of equal scores the first class and anchor
    if recipe.max_detections:
        best_first = best_first[: recipe.max_detections]
    kept = kept[best_first]
    return Detections(
        boxes=torch.from_numpy(boxes[kept].clip(0, corner)),
        scores=torch.from_numpy(scores[best_first]),
        labels=torch.from_numpy(labels[kept]),
    )


@functools.cache
def anchors_on(device: torch.device, recipe: Recipe) -> Tensor:
    """Return the anchors (P, 4) `cxcywh` on a device, where they stay for the next call."""
    return make_anchors(recipe).to(device)


def candidates(started: Started, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes and scores on the host of all anchors that can have a detection, and some more.

    Boxes (N, K, 4) are normalised xyxy; scores (N, K, num_classes) are without the background. The
    anchors keep their order. Only where an image may have more than the likeliest anchors, a second
    pass takes them all.
    """
    packed = started.likeliest.wait().numpy()
    most_passing = packed[:, 0, NUM_PASSING].max()
    if most_passing > packed.shape[1]:
        num_anchors = started.outputs[0].shape[1]
        packed = likeliest_candidates(started.outputs, num_anchors, recipe).cpu().numpy()
    # In the order of the anchors, whichever order the device's topk has.
    order = packed[:, :, POSITION].argsort(axis=1)
    packed = np.take_along_axis(packed, order[:, :, np.newaxis], axis=1)
    return packed[:, :, :4], packed[:, :, 4:NUM_PASSING]


def likeliest_candidates(outputs: tuple[Tensor, Tensor], count: int, recipe: Recipe) -> Tensor:
    """Return `count` anchors of each image, those that are likeliest to have a detection.

    They are chosen on the device, in steps of fixed shape. The rows (N, count, 4 + num_classes + 2)
    are a box, as `candidates` has it, its scores, the number of anchors of the image that can pass,
    and the position of this one.
    """
    deltas, logits = outputs
    # A probability is less than exp(its logit - the background's). So where it passes the
    # threshold, this margin exceeds the threshold's logarithm, which hardly any anchor's does.
    margin = logits[:, :, 1:].amax(dim=2).float() - logits[:, :, 0].float()
    log_threshold = math.log(max(recipe.score_threshold, 1e-30))
    can_pass = margin > log_threshold
    # NaN would be the largest of all; it never passes.
    margin = torch.where(can_pass, margin, -math.inf)
    chosen = margin.topk(count, dim=1).indices

    image = torch.arange(len(chosen), device=chosen.device).unsqueeze(1)
    anchors = anchors_on(logits.device, recipe)
    chosen_outputs = (deltas[image, chosen], logits[image, chosen])
    boxes, scores = decode_outputs(chosen_outputs, anchors[chosen], recipe)
    # Whole numbers below 2**24 are exact in float32.
    num_passing = can_pass.sum(dim=1, dtype=torch.int32).float()  # (N,)
    num_passing = num_passing.view(-1, 1, 1).expand(-1, count, -1)
    position = chosen.unsqueeze(-1).float()
    return torch.cat([boxes, scores[:, :, 1:], num_passing, position], dim=2)


def submission_boxes(boxes_xyxy: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return boxes (n, 4) as COCO rows count them: with `plus_one` a pixel wider and higher."""
    if not recipe.plus_one:
        return boxes_xyxy
    return boxes_xyxy + np.array([0, 0, 1, 1], boxes_xyxy.dtype)


@np.errstate(invalid="ignore", over="ignore")  # 0 / 0 and infinite boxes lower nothing
def soft_nms(
    boxes_xyxy: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    iou_threshold: float,
    min_score: float,
    limit: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Run linear soft-NMS on each class (Bodla et al., ICCV 2017).

    The inputs are boxes (n, 4) float32, scores (n,) float32 and labels (n,) in ascending order. The
    best box of a class is taken; the score of every other one that has an IoU above `iou_threshold`
    with it is multiplied by 1 - IoU, and boxes whose score falls below `min_score` are dropped.
    This is repeated up to `limit` times. The results are the indices (k,) of the boxes taken and
    their scores then (k,).
    """
    if not len(labels):
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    # A row for each class, padded with boxes of score 0: one step serves all classes.
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    column = np.arange(counts.max())
    is_box = column < counts[:, np.newaxis]
    index = np.where(is_box, first[:, np.newaxis] + column, 0)  # (classes, columns)
    scores = np.where(is_box, scores[index], 0)
    x1, y1, x2, y2 = np.ascontiguousarray(boxes_xyxy[index].transpose(2, 0, 1))
    areas = (x2 - x1) * (y2 - y1)

    row = np.arange(len(counts))[:, np.newaxis]
    taken = []
    taken_scores = []
    for _ in range(limit):
        best_column = scores.argmax(axis=1, keepdims=True)  # of equal scores the first
        best_scores = scores[row, best_column]  # (classes, 1)
        if not best_scores.any():
            break
        taken.append(index[row, best_column])
        taken_scores.append(best_scores)
        overlap_right = np.minimum(x2, x2[row, best_column])
        overlap_bottom = np.minimum(y2, y2[row, best_column])
        overlap_width = overlap_right - np.maximum(x1, x1[row, best_column])
        overlap_height = overlap_bottom - np.maximum(y1, y1[row, best_column])
        overlap = np.maximum(overlap_width, 0) * np.maximum(overlap_height, 0)
        iou = overlap / (areas + areas[row, best_column] - overlap)
        scores *= np.where(iou > iou_threshold, 1 - iou, 1)
        scores[row, best_column] = 0
        scores[scores < min_score] = 0
    all_taken = np.concatenate(taken)
    all_scores = np.concatenate(taken_scores)
    # The best score of a class of which no box is left is 0.
    is_real = all_scores > 0
    return all_taken[is_real], all_scores[is_real]


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Return for each element how many of the same class come before it."""
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return rank
