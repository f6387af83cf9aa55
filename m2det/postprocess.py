"""Raw outputs to detections: softmax, decoding, per class soft-NMS or hard NMS, clipping."""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.nms import class_nms
from m2det.anchors import decode, make_anchors, to_ltrb
from m2det.config import Recipe

FEW = 2048  # priors of an image that are looked at first: realistic outputs have some hundreds


class Detections(NamedTuple):
    """Detections of one image on the host, best first."""

    boxes: Tensor  # (n, 4) float32 xyxy, pixels of the original image, clipped to it
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int64 0-based classes


@torch.no_grad()
def decode_outputs(
    outputs: Iterable[Tensor], anchors: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Boxes (..., 4) normalised ltrb and probabilities (..., 1 + classes), background first."""
    offsets, logits = (output.float() for output in outputs)
    return to_ltrb(decode(offsets, anchors, recipe)), logits.softmax(dim=-1)


@torch.no_grad()
def detect(outputs: tuple[Tensor, Tensor], sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Detections of N images; `sizes` (N, 2) are the original (height, width) in pixels.

    Per class all scores above `score_threshold` enter NMS, in pixels and fp32, a box being
    x2 - x1 + 1 wide; the first `max_per_class` survivors are kept, and of an image's the
    `max_detections` best, if that is not 0. Boxes are clipped to the image last.

    An accelerator hands over the FEW likeliest priors of each image in one copy, and all of them in
    a second one where an image may have more: none is ever lost.
    """
    boxes, scores = _candidates(outputs, recipe, outputs[0].device.type == "cpu")
    images, _, channels = scores.shape
    scores[:, :, 0] = 0
    # Flat: numpy's nonzero of several axes takes several times as long.
    passed = np.flatnonzero(scores > recipe.score_threshold)
    row, channel = np.divmod(passed, channels)
    image = row // scores.shape[1]
    limits = sizes.flip(1).repeat(1, 2).float().numpy()  # width, height, width, height
    boxes, scores = boxes.reshape(-1, 4)[row] * limits[image], scores.reshape(-1)[passed]
    group = image * channels + channel

    # Of 16 bits or less, which numpy sorts several times faster.
    order = np.argsort(group.astype(np.min_scalar_type(images * channels)), kind="stable")
    boxes, scores, group = boxes[order], scores[order], group[order]
    outer = boxes + np.array([0, 0, 1, 1], np.float32)  # x2 - x1 + 1 becomes x2 - x1
    if recipe.nms == "soft":
        overlap, least = recipe.soft_nms_iou, recipe.soft_nms_min_score
        kept, scores = soft_nms(outer, scores, group, overlap, least, recipe.max_per_class)
    else:
        kept = class_nms(outer, scores, group, recipe.hard_nms_iou)
        kept = kept[_place_in_group(group[kept]) < recipe.max_per_class]
        scores = scores[kept]

    best = np.lexsort((kept, -scores))  # ties in the order of classes and priors
    boxes, scores, (image, channel) = (
        boxes[kept[best]],
        scores[best],
        divmod(group[kept[best]], channels),
    )
    detections = []
    for number in range(images):
        own = np.flatnonzero(image == number)[: recipe.max_detections or None]
        parts = np.clip(boxes[own], 0, limits[number]), scores[own], channel[own] - 1
        detections.append(Detections(*map(torch.from_numpy, parts)))
    return detections


@functools.cache
def _anchors(recipe: Recipe, device: torch.device) -> Tensor:
    return make_anchors(recipe).to(device)


def _candidates(
    outputs: tuple[Tensor, Tensor], recipe: Recipe, on_host: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What `decode_outputs` makes of each image's likely priors, and maybe more, in their order."""
    logits = outputs[1]
    anchors = _anchors(recipe, logits.device)
    # Where a probability passes, its logit exceeds background's by more than its logarithm: most
    # priors have none such.
    margin = logits[:, :, 1:].amax(dim=2).float() - logits[:, :, 0].float()
    least = math.log(max(recipe.score_threshold, 1e-30))
    margin = torch.where(margin > least, margin, -math.inf)
    if on_host:  # it costs nothing to ask how many there are
        count = int((margin > -math.inf).sum(dim=1).max())
        return _likeliest(outputs, margin, anchors, recipe, count)
    boxes, scores = _likeliest(outputs, margin, anchors, recipe, FEW)
    if (scores[:, :, 0] > 0).all(axis=1).any():  # an image may have more
        boxes, scores = _likeliest(outputs, margin, anchors, recipe, len(anchors))
    return boxes, scores


def _likeliest(
    outputs: tuple[Tensor, Tensor], margin: Tensor, anchors: Tensor, recipe: Recipe, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the `count` priors of largest `margin` (N, P), by steps of fixed shape and one copy.

    In the place of background's probability is 0 where the margin is -inf: the prior cannot pass.
    """
    margin, chosen = margin.topk(min(count, len(anchors)), dim=1)
    chosen, order = chosen.sort(dim=1)
    rows = chosen + len(anchors) * torch.arange(len(chosen), device=chosen.device).unsqueeze(1)
    picked = (output.flatten(0, 1)[rows] for output in outputs)
    boxes, scores = decode_outputs(picked, anchors[chosen], recipe)
    scores[:, :, 0] = margin.gather(1, order) > -math.inf
    packed = torch.cat([boxes, scores], dim=2).cpu().numpy()
    return packed[:, :, :4], packed[:, :, 4:]


def submission_boxes(boxes_xyxy: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Boxes (n, 4) as COCO rows count them: with `plus_one` a pixel wider and higher."""
    return boxes_xyxy + np.array([0, 0, 1, 1], boxes_xyxy.dtype) * recipe.plus_one


def soft_nms(
    boxes_xyxy: np.ndarray,
    scores: np.ndarray,
    group: np.ndarray,
    iou_threshold: float,
    min_score: float,
    limit: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Linear soft-NMS (Bodla et al., ICCV 2017) in every group at once: positions and new scores.

    boxes_xyxy (n, 4) float32, scores (n,) float32, group (n,) ascending. The best box of a group
    is taken, every other's score times 1 - IoU where their IoU is greater than `iou_threshold`;
    those below `min_score` go; and so on, `limit` times.
    """
    starts = np.flatnonzero(np.diff(group, prepend=-1) != 0)
    sizes = np.diff(starts, append=len(group))
    positions, lowered = [starts[:0]], [scores[:0]]
    # A score only falls: those below what is taken last do not matter. So the best few of a group
    # are tried first, and only groups of which more matter get another try.
    few = 2 * limit
    while len(starts):
        rows = np.arange(len(starts))[:, None]
        columns = np.arange(sizes.max())
        real = columns < sizes[:, None]
        member = np.where(real, starts[:, None] + columns, 0)
        values = np.where(real, scores[member], 0)
        left_out = np.zeros(len(starts), np.float32)
        if few < len(columns):
            order = np.argpartition(-values, few, axis=1)
            left_out = values[rows, order[:, few:]].max(axis=1)
            order = np.sort(order[:, :few], axis=1)  # of equal scores the first is taken
            member, values = member[rows, order], values[rows, order]
        chosen, new = _select(boxes_xyxy[member], values, iou_threshold, min_score, limit)
        done = (new[:, -1] > left_out) | (left_out == 0)
        taken = done[:, None] & (new > 0)
        positions.append(member[rows, chosen][taken])
        lowered.append(new[taken])
        starts, sizes, few = starts[~done], sizes[~done], 4 * few
    return np.concatenate(positions), np.concatenate(lowered)


@np.errstate(invalid="ignore", over="ignore")  # 0 / 0 and infinite boxes lower nothing
def _select(
    boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, min_score: float, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of groups (G, L, 4): columns taken (G, limit) and their scores, 0 where there is none."""
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.transpose(2, 0, 1))
    areas = (x2 - x1) * (y2 - y1)
    scores = scores.copy()
    rows = np.arange(len(scores))
    chosen = np.zeros((len(scores), limit), np.int64)
    taken = np.zeros((len(scores), limit), np.float32)
    for step in range(limit):
        best = scores.argmax(axis=1)
        chosen[:, step], taken[:, step] = best, scores[rows, best]
        if not taken[:, step].any():
            break
        left, top, right, bottom, area = (
            side[rows, best][:, None] for side in (x1, y1, x2, y2, areas)
        )
        overlap = np.maximum(np.minimum(x2, right) - np.maximum(x1, left), 0)
        overlap *= np.maximum(np.minimum(y2, bottom) - np.maximum(y1, top), 0)
        iou = overlap / (areas + area - overlap)
        scores *= np.where(iou > iou_threshold, 1 - iou, 1)
        scores[rows, best] = 0
        scores[scores < min_score] = 0
    return chosen, taken


def _place_in_group(group: np.ndarray) -> np.ndarray:
    """How many of the same group come before each."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1) != 0)
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
    return rank
