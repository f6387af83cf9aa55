"""Which boxes of a data set the anchors fit: asked by `train.py --check_data` and compare.py."""

import numpy as np

from common.coco.coverage import anchor_matching, fitted_boxes
from m2det.anchors import make_anchors, to_xyxy
from m2det.config import Recipe
from m2det.targets import pairwise_iou


def seen_boxes(boxes_xyxy: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return which boxes (B, 4), in pixels of the network input, have an anchor that fits."""
    anchors_xyxy = to_xyxy(make_anchors(recipe)) * recipe.image_size
    return fitted_boxes(boxes_xyxy, anchors_xyxy, pairwise_iou, recipe.match_iou)


MATCHING = anchor_matching(
    fields=("anchor_sizes", "anchor_maps", "anchor_steps", "anchor_ratios"),
    seen_boxes=seen_boxes,
)
