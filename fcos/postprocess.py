"""Raw outputs to detections: the best points of each level, decoding, NMS by class."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.detections import Detections
from common.coco.nms import class_nms
from common.npu.overlap import HostCopy
from fcos.anchors import MapSizes, decode, make_anchors, point_strides
from fcos.config import Recipe
from fcos.data import resized_size
from fcos.model import Outputs


class Started(NamedTuple):
    """What `start_detect` has issued for N images."""

    best: HostCopy  # (N, K, 4 + 1 + classes): boxes, centerness and probabilities


@torch.no_grad()
def detect(outputs: Outputs, sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Return the detections of N images from raw outputs.

    `sizes` (N, 2) are the (height, width) of the original images in pixels. Boxes are clipped to
    the image. Those with a class probability above `score_threshold` enter greedy NMS in fp32. The
    score, by which they are ranked, is that probability times the centerness.
    """
    return finish_detect(start_detect(outputs, recipe), sizes, recipe)


def detect_resized(
    outputs: Outputs, resized_sizes: Tensor, factors: Tensor, recipe: Recipe
) -> list[Detections]:
    """Return the detections of N images whose size in the network input is known.

    `resized_sizes` (N, 2) are their (height, width) there in pixels, and `factors` (N, 2) float32
    these sizes over the original ones.
    """
    return finish_resized(start_detect(outputs, recipe), resized_sizes, factors, recipe)


@torch.no_grad()
def start_detect(outputs: Outputs, recipe: Recipe) -> Started:
    """Issue the device's part of `detect`: steps of fixed shapes, for which nothing waits."""
    boxes, logits, centerness = decode_outputs(outputs, recipe)
    centerness = centerness.sigmoid()
    # The sigmoid rises with the logit: few points need that of every class.
    scores = logits.amax(dim=2).sigmoid() * centerness.squeeze(2)  # (N, P)
    best = best_points(scores, outputs.map_sizes(), recipe.candidates)
    of_best = [
        gather_points(boxes, best),
        gather_points(centerness, best),
        gather_points(logits, best).sigmoid(),
    ]
    # In one tensor, for one copy.
    return Started(HostCopy(torch.cat(of_best, dim=2)))


def finish_detect(started: Started, sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Do the host's part of `detect`, once the copy from the device is there."""
    original_sizes = sizes.tolist()
    resized_sizes = []
    for height, width in original_sizes:
        resized_sizes.append(resized_size(height, width, recipe.eval_scale))
    factors = torch.tensor(resized_sizes) / torch.tensor(original_sizes)
    return finish_resized(started, torch.tensor(resized_sizes), factors, recipe)


def finish_resized(
    started: Started, resized_sizes: Tensor, factors: Tensor, recipe: Recipe
) -> list[Detections]:
    """Do the host's part of `detect_resized`, once the copy from the device is there."""
    packed = started.best.wait().numpy()
    boxes = packed[:, :, :4]
    centerness = packed[:, :, 4:5]
    probabilities = packed[:, :, 5:]

    detections = []
    for i in range(len(packed)):
        height, width = resized_sizes[i].tolist()
        factor_y, factor_x = factors[i].tolist()
        clipped = np.clip(boxes[i], 0, np.float32([width, height, width, height]))
        original = clipped / np.float32([factor_x, factor_y, factor_x, factor_y])
        detections.append(select(original, probabilities[i], centerness[i], recipe))
    return detections


@torch.no_grad()
def decode_outputs(outputs: Outputs, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes, class logits and centerness logits of all points, all fp32.

    The boxes (N, P, 4) are xyxy in pixels of the network input, not clipped. The logits are (N, P,
    classes) and (N, P, 1).
    """
    logits, distances, centerness = outputs.flat()
    map_sizes = outputs.map_sizes()
    device = distances.device
    if recipe.norm_on_bbox:
        distances = distances * point_strides(recipe, map_sizes, device)
    boxes = decode(distances, make_anchors(recipe, map_sizes, device))
    return boxes, logits, centerness


def best_points(scores: Tensor, map_sizes: MapSizes, candidates: int) -> Tensor:
    """Return the indices (N, K) of the points with the highest scores (N, P).

    Of each level there are `candidates`, or all if the level has fewer points.
    """
    best = []
    start = 0
    for rows, columns in map_sizes:
        count = rows * columns
        of_level = scores[:, start : start + count]
        indices = of_level.topk(min(count, candidates), dim=1).indices
        best.append(indices + start)
        start += count
    return torch.cat(best, dim=1)


def gather_points(values: Tensor, indices: Tensor) -> Tensor:
    """Return the values (N, K, C) of the points with the given indices (N, K), of (N, P, C)."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[2]))


def select(
    boxes: np.ndarray, probabilities: np.ndarray, centerness: np.ndarray, recipe: Recipe
) -> Detections:
    """Return the detections among the K candidates of an image.

    `boxes` (K, 4) are xyxy in pixels of the original image, `probabilities` (K, classes) and
    `centerness` (K, 1).
    """
    point, label = np.nonzero(probabilities > recipe.score_threshold)
    boxes = boxes[point]
    scores = probabilities[point, label] * centerness[point, 0]
    keep = class_nms(boxes, scores, label, recipe.nms_iou, recipe.max_detections)
    return Detections(
        boxes=torch.from_numpy(boxes[keep]),
        scores=torch.from_numpy(scores[keep]),
        labels=torch.from_numpy(label[keep]),
    )
