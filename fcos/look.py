"""Training samples as the network gets them: its input undone, and the points of each box."""

from torch import Tensor

from common.coco.look import Sample, make_samples
from common.npu.operators import constant
from fcos.anchors import make_anchors, make_axes, map_sizes
from fcos.config import Recipe
from fcos.data import Batch
from fcos.loss import DetectionLoss
from fcos.targets import assign


def samples_of_batch(
    images: Tensor, boxes: Tensor, batch: Batch, recipe: Recipe, criterion: DetectionLoss
) -> list[Sample]:
    """Return the samples of a batch; `images` and `boxes` are what `augment` makes of it.

    The points follow from the size of the images: the `criterion`, as other models need it, is
    not used.
    """
    sizes = map_sizes(recipe, *images.shape[2:])
    axes = make_axes(recipe, sizes, images.device)
    positive, matched, _ = assign(axes, boxes, batch.labels, batch.valid, recipe.center_radius)
    return make_samples(
        denormalise(images, recipe),
        boxes,
        batch.labels,
        batch.valid,
        batch.image_ids,
        make_anchors(recipe, sizes, images.device),
        positive,
        matched,
    )


def denormalise(images: Tensor, recipe: Recipe) -> Tensor:
    """Return network input (N, 3, H, W) as RGB in 0..255: the inverse of `normalise`.

    What `normalise` made 0 around an image has the colour of the mean.
    """
    bgr = images + constant(recipe.mean, images.device).view(3, 1, 1)
    return bgr.flip(1)
