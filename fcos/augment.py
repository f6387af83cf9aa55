"""What the device does to a batch: normalisation and padding.

The workers of the loader resize and flip (data.py). An image is flipped within its width, not
within that of its canvas: on the device that would be a gather, in a worker it is a plain flip.
"""

from torch import Tensor

from fcos.config import Recipe
from fcos.data import Batch, normalise


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the network input (N, 3, H, W) float32 of a batch, and its boxes.

    The boxes are (N, M, 4) xyxy in pixels of the network input.
    """
    images = normalise(batch.images, batch.resized_sizes, recipe)
    return images, batch.boxes
