"""Batched augmentation on the device: flip, colour jitter, normalisation.

The colour operations work on floats and never cut them to 0..1, as TensorFlow's. Nothing is drawn
here: factors come with the batch.
"""

import torch
from torch import Tensor

from common.npu.device import chunk_size
from ssd_resnet34.data import normalise
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.data import Batch


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Network input (N, 3, H, W) float32, channels last, and boxes (N, M, 4) of a batch."""
    images, boxes, flip = batch.images, batch.boxes, batch.flip
    if recipe.augment:
        at_once = chunk_size(images)
        parts = zip(*(x.split(at_once) for x in (images, flip, batch.jitter)), strict=True)
        images = torch.cat([_recoloured_bytes(_flipped(x, f), j) for x, f, j in parts])
        left, top, right, bottom = boxes.unbind(-1)
        mirrored = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
        boxes = torch.where(flip.view(-1, 1, 1), mirrored, boxes)
    return normalise(images, recipe), boxes


def _flipped(images: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(2), images)


def _recoloured_bytes(images: Tensor, jitter: Tensor) -> Tensor:
    return recolour(images.permute(0, 3, 1, 2).float() / 255, jitter).permute(0, 2, 3, 1) * 255


def recolour(images: Tensor, jitter: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue, in this order, of (N, 3, H, W) in 0..1; the result may
    lie outside. `jitter` (N, 4) as in a Batch."""
    brightness, contrast, saturation, hue = jitter.view(-1, 4, 1, 1, 1).unbind(1)
    images = images + brightness
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast)

    # Saturation and hue in one turn through hue, saturation and value: nothing is lost between.
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    scale = torch.where(chroma > 0, 1 / chroma, 0.0)
    sector = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    sector = sector + 6 * hue.squeeze(1)
    share = torch.where(value > 0, chroma / value, 0.0)
    chroma = (share * saturation.squeeze(1)).clamp(0, 1) * value
    # Each channel falls from the value to the minimum as the sector leaves the channel's own.
    planes = []
    for own in (5, 3, 1):
        distance = (sector + own).remainder(6)
        planes.append(value - torch.minimum(distance, 4 - distance).clamp(0, 1) * chroma)
    return torch.stack(planes, dim=1)
