"""Which boxes of a data set have a point: asked by `train.py --check_data` and compare.py."""

import numpy as np
import torch

from common.coco.coverage import Matching
from fcos.anchors import make_axes, map_sizes
from fcos.config import Recipe
from fcos.data import canvas_size, resized_size
from fcos.targets import has_point

BOXES_AT_ONCE = 4096


def input_size(recipe: Recipe) -> str:
    """Return the largest short and long side of a resized image in words, in pixels."""
    short, long = recipe.eval_scale
    return f"{short},{long}"


def boxes_in_input(boxes_xyxy: np.ndarray, image_sizes: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return boxes (B, 4) of images of (height, width) (B, 2) in pixels of the network input."""
    different_sizes, which = np.unique(image_sizes, axis=0, return_inverse=True)
    resized_sizes = []
    for height, width in different_sizes.tolist():
        resized_sizes.append(resized_size(height, width, recipe.eval_scale))
    factors = np.array(resized_sizes).reshape(-1, 2) / different_sizes
    factors_of_boxes = factors[which.reshape(-1)][:, ::-1]  # of x and y
    return boxes_xyxy * np.tile(factors_of_boxes, 2)


def seen_boxes(boxes_xyxy: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return which boxes (B, 4), in pixels of the network input, have a point.

    The points are those of a canvas for every image: a box has none beyond its own image.
    """
    height, width = canvas_size([recipe.eval_scale], "square", (recipe.eval_scale,))
    axes = make_axes(recipe, map_sizes(recipe, height, width))
    boxes = torch.as_tensor(boxes_xyxy, dtype=torch.float32)
    seen = [np.zeros(0, dtype=bool)]
    for some_boxes in boxes.split(BOXES_AT_ONCE):
        found = has_point(axes, some_boxes.unsqueeze(0), recipe.center_radius)
        seen.append(found.squeeze(0).numpy())
    return np.concatenate(seen)


MATCHING = Matching(
    kind="points",
    fields=("eval_scale", "strides", "ranges", "center_radius"),
    input_size=input_size,
    boxes_in_input=boxes_in_input,
    seen_boxes=seen_boxes,
    seen="a point of the level that learns boxes of its size lies inside the box",
    unseen="not learned at all",
)
