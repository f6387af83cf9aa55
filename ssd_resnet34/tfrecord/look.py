"""Training samples as the network gets them: its input undone, and the anchors of each box."""

from torch import Tensor

from common.coco.look import Sample, make_samples
from ssd_resnet34.look import denormalise
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.data import Batch
from ssd_resnet34.tfrecord.loss import DetectionLoss
from ssd_resnet34.tfrecord.targets import assign


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
