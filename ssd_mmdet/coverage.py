"""Which boxes of a data set the anchors fit: asked by `train.py --check_data` and compare.py."""

import numpy as np

from common.coco.coverage import anchor_matching, fitted_boxes
from ssd_mmdet.anchors import make_anchors
from ssd_mmdet.config import Recipe
from ssd_mmdet.targets import pairwise_iou


def seen_boxes(boxes_xyxy: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return which boxes (B, 4), in pixels of the network input, have an anchor that fits."""
    return fitted_boxes(boxes_xyxy, make_anchors(recipe), pairwise_iou, recipe.match_iou)


MATCHING = anchor_matching(
    fields=("anchor_sizes", "anchor_maps", "anchor_strides", "anchor_ratios"),
    seen_boxes=seen_boxes,
)
