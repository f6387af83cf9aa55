"""Raw outputs to detections: the best points of each level, decoding, NMS per class."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.nms import class_nms
from fcos.anchors import decode, make_anchors, point_strides
from fcos.config import Recipe
from fcos.data import resized_size
from fcos.model import Outputs


class Detections(NamedTuple):
    """Detections of one image on the host, best first."""

    boxes: Tensor  # (n, 4) float32 xyxy, pixels of the original image
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int64 0-based classes


@torch.no_grad()
def decode_outputs(outputs: Outputs, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, P, 4) xyxy in pixels of the input, not clipped, class logits (N, P, classes) and
    centerness logits (N, P, 1), all fp32."""
    logits, distances, centerness = outputs.flat()
    sizes, device = outputs.sizes(), distances.device
    if recipe.norm_on_bbox:
        distances = distances * point_strides(recipe, sizes, device)
    return decode(distances, make_anchors(recipe, sizes, device)), logits, centerness


@torch.no_grad()
def detect(outputs: Outputs, sizes: Tensor, recipe: Recipe) -> list[Detections]:
    """Detections of N images; `sizes` (N, 2) are the original (height, width) in pixels.

    Boxes are clipped to the image; those of a class probability above `score_threshold` enter
    greedy NMS, in fp32, by their probability times centerness, and the `max_detections` best of
    what survives are returned.
    """
    original = sizes.tolist()
    resized = [resized_size(height, width, recipe.eval_scale) for height, width in original]
    factors = torch.tensor(resized) / torch.tensor(original)
    return detect_in(outputs, torch.tensor(resized), factors, recipe)


@torch.no_grad()
def detect_in(
    outputs: Outputs, resized: Tensor, factors: Tensor, recipe: Recipe
) -> list[Detections]:
    """The same for images that are `resized` (N, 2) pixels high and wide in the input, `factors`
    (N, 2) float32 times their original size."""
    packed = _best(*decode_outputs(outputs, recipe), outputs.sizes(), recipe).cpu().numpy()
    found = []
    for image, size, factor in zip(packed, resized.numpy(), factors.numpy(), strict=True):
        boxes, centerness, scores = image[:, :4], image[:, 4], image[:, 5:]
        height, width = size.astype(np.float32)
        boxes = np.clip(boxes, 0, (width, height, width, height)) / factor[[1, 0, 1, 0]]
        # Flat: numpy's nonzero of two axes takes several times as long.
        passed = np.flatnonzero(scores > recipe.score_threshold)
        points, labels = np.divmod(passed, scores.shape[1])
        scores, boxes = scores[points, labels] * centerness[points], boxes[points]
        keep = class_nms(boxes, scores, labels, recipe.nms_iou, recipe.max_detections)
        parts = (boxes[keep], scores[keep], labels[keep])
        found.append(Detections(*map(torch.from_numpy, parts)))
    return found


def _best(
    boxes: Tensor, logits: Tensor, centerness: Tensor, sizes: tuple, recipe: Recipe
) -> Tensor:
    """Of each level the `candidates` points of highest score, (N, K, 4 + 1 + classes): boxes,
    centerness and class probabilities, by fixed-shape steps on the device."""
    centerness = centerness.sigmoid()
    # The sigmoid rises: that of the largest logit is the largest, and few points need the others.
    score = logits.amax(dim=2, keepdim=True).sigmoid() * centerness
    counts = [rows * columns for rows, columns in sizes]
    chosen, start = [], 0
    for count, level in zip(counts, score.squeeze(-1).split(counts, dim=1), strict=True):
        best = level.topk(min(count, recipe.candidates), dim=1).indices
        chosen.append(best + start)
        start += count
    index = torch.cat(chosen, dim=1).unsqueeze(-1)
    probability = logits.gather(1, index.expand(-1, -1, logits.shape[2])).sigmoid()
    parts = (boxes.gather(1, index.expand(-1, -1, 4)), centerness.gather(1, index), probability)
    return torch.cat(parts, dim=2)
