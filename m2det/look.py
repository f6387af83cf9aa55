"""Training samples as the network gets them: its input undone, and the anchors of each box."""

from torch import Tensor

from common.coco.look import Sample, make_samples
from common.npu.operators import constant
from m2det.config import Recipe
from m2det.data import Batch
from m2det.loss import DetectionLoss
from m2det.targets import assign


def samples_of_batch(
    images: Tensor, boxes: Tensor, batch: Batch, recipe: Recipe, criterion: DetectionLoss
) -> list[Sample]:
    """Return the samples of a batch; `images` and `boxes` are what `augment` makes of it."""
    anchors = criterion.anchors_xyxy
    positive, matched, _ = assign(anchors, boxes, batch.labels, batch.valid, recipe.match_iou)
    return make_samples(
        denormalise(images, recipe),
        boxes * recipe.image_size,
        batch.labels,
        batch.valid,
        batch.image_ids,
        anchors * recipe.image_size,
        positive,
        matched,
    )


def denormalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Return network input (N, 3, H, W) as RGB in 0..255: the inverse of `normalise`."""
    bgr = images + constant(recipe.mean, images.device).view(3, 1, 1)
    return bgr.flip(1)
