"""Training samples as the network gets them: its input undone, and the anchors of each box."""

from torch import Tensor

from common.coco.look import Sample, make_samples
from common.npu.operators import constant
from ssd_mmdet.config import Recipe
from ssd_mmdet.data import Batch
from ssd_mmdet.loss import DetectionLoss
from ssd_mmdet.targets import assign


def samples_of_batch(
    images: Tensor, boxes: Tensor, batch: Batch, recipe: Recipe, criterion: DetectionLoss
) -> list[Sample]:
    """Return the samples of a batch; `images` and `boxes` are what `augment` makes of it."""
    anchors = criterion.anchors
    positive, matched, _ = assign(anchors, boxes, batch.labels, batch.valid, recipe.match_iou)
    return make_samples(
        denormalise(images, recipe),
        boxes,
        batch.labels,
        batch.valid,
        batch.image_ids,
        anchors,
        positive,
        matched,
    )


def denormalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Return network input (N, 3, H, W) as RGB in 0..255: the inverse of `normalise`."""
    return images + constant(recipe.mean, images.device).view(3, 1, 1)
