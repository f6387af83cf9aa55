"""Which boxes of a data set the anchors fit: asked by `train.py --check_data` and compare.py."""

import numpy as np

from common.coco.coverage import Matching, fitted_boxes
from ssd_resnet34.anchors import make_anchors, to_xyxy
from ssd_resnet34.config import Recipe
from ssd_resnet34.targets import pairwise_iou


def input_size(recipe: Recipe) -> str:
    """Return the size of the network input in words, in pixels."""
    return f"{recipe.image_size} x {recipe.image_size}"


def boxes_in_input(boxes_xyxy: np.ndarray, image_sizes: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return boxes (B, 4) of images of (height, width) (B, 2) in pixels of the network input."""
    factors = recipe.image_size / image_sizes[:, ::-1]  # of x and y
    return boxes_xyxy * np.tile(factors, 2)


def seen_boxes(boxes_xyxy: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return which boxes (B, 4), in pixels of the network input, have an anchor that fits."""
    anchors_xyxy = to_xyxy(make_anchors(recipe)) * recipe.image_size
    return fitted_boxes(boxes_xyxy, anchors_xyxy, pairwise_iou, recipe.match_iou)


MATCHING = Matching(
    kind="anchors",
    fields=("image_size", "anchor_sizes", "anchor_maps", "anchor_steps", "anchor_ratios"),
    input_size=input_size,
    boxes_in_input=boxes_in_input,
    seen_boxes=seen_boxes,
    seen="an anchor overlaps the box with an IoU above 0.5",
    unseen="learned from the one anchor that overlaps them most, too little to be found reliably",
)
