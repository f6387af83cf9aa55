"""What the device does to a batch: normalisation and padding.

Flip and scale are done by the worker as it resizes (data.py): a flip within each image's own
width would be a gather over the canvas here, there it costs nothing.
"""

from torch import Tensor

from fcos.config import Recipe
from fcos.data import Batch, normalise


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Network input (N, 3, H, W) float32 and boxes (N, M, 4) xyxy in its pixels of a batch."""
    return normalise(batch.images, batch.sizes, recipe), batch.boxes
