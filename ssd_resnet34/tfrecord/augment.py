"""Batched augmentation on the device: flip, colour jitter, normalisation.

As in TensorFlow, the colour operations work on floats and do not clip them to 0..1. Nothing is
drawn here: the factors come with the batch.
"""

import torch
from torch import Tensor

from common.npu.operators import constant
from ssd_resnet34.augment import SECTOR_OFFSETS, flip_boxes, flip_images
from ssd_resnet34.data import normalise
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.data import Batch


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the network input (N, 3, H, W) float32 of a batch, and its boxes (N, M, 4).

    The boxes are normalised xyxy.
    """
    images = batch.images
    boxes = batch.boxes
    if recipe.augment:
        images = flip_images(images, batch.flip)
        channels = images.permute(3, 0, 1, 2)  # (3, N, H, W)
        channels = channels.to(torch.float32, memory_format=torch.contiguous_format) / 255
        channels = jitter_colours(channels, batch.colour_jitter)
        images = channels.permute(1, 2, 3, 0) * 255
        boxes = flip_boxes(boxes, batch.flip)
    return normalise(images, recipe), boxes


def jitter_colours(channels: Tensor, colour_jitter: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order.

    `channels` (3, N, H, W) are the images' RGB in 0..1; the result may lie outside. `colour_jitter`
    (N, 4) is as in a Batch.
    """
    brightness, contrast, saturation, hue = colour_jitter.view(-1, 4, 1, 1).unbind(1)
    channels = channels + brightness
    mean = channels.mean(dim=(2, 3), keepdim=True)
    channels = torch.lerp(mean, channels, contrast)
    return change_saturation_and_hue(channels, saturation, hue)


def change_saturation_and_hue(channels: Tensor, factor: Tensor, turns: Tensor) -> Tensor:
    """Multiply the saturation of images (3, N, H, W) by `factor` and turn their hue by `turns`.

    Both are (N, 1, 1). One conversion to hue, saturation and value (HSV) and back serves both. The
    hue is counted in sectors, sixths of a turn: 0 is red, 2 green, 4 blue.
    """
    red, green, blue = channels.unbind(0)
    value = channels.amax(dim=0)
    chroma = value - channels.amin(dim=0)
    zero = constant(0.0, channels.device)
    scale = torch.where(chroma > 0, chroma.reciprocal(), zero)
    sector_if_green = (blue - red) * scale + 2
    sector_if_blue = (red - green) * scale + 4
    sector = torch.where(value == green, sector_if_green, sector_if_blue)
    sector = torch.where(value == red, (green - blue) * scale, sector)

    sector = sector + 6 * turns
    saturation = torch.where(value > 0, chroma / value, zero)
    chroma = (saturation * factor).clamp(0, 1) * value

    # From the value to the minimum, as the hue moves away from the channel's own colour.
    offsets = constant(SECTOR_OFFSETS, channels.device).view(3, 1, 1, 1)
    distance = (sector + offsets).remainder(6)  # (3, N, H, W)
    fall = torch.minimum(distance, 4 - distance).clamp(0, 1)
    return value - fall * chroma
