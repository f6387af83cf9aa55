"""Which boxes of a data set the anchors fit: asked by `train.py --check_data` and compare.py."""

import numpy as np

from common.coco.coverage import fitted_boxes
from ssd_resnet34.coverage import MATCHING as COCO_MATCHING
from ssd_resnet34.targets import pairwise_iou
from ssd_resnet34.tfrecord.anchors import make_anchors
from ssd_resnet34.tfrecord.config import Recipe


def seen_boxes(boxes_xyxy: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return which boxes (B, 4), in pixels of the network input, have an anchor that fits."""
    anchors_xyxy = make_anchors(recipe) * recipe.image_size
    return fitted_boxes(boxes_xyxy, anchors_xyxy, pairwise_iou, recipe.match_iou)


MATCHING = COCO_MATCHING._replace(seen_boxes=seen_boxes)
