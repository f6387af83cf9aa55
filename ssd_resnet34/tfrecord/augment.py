"""Batched augmentation on the device: flip, colour jitter, normalisation.

As in TensorFlow, the colour operations work on floats and do not clip them to 0..1. Nothing is
drawn here: the factors come with the batch.
"""

import torch
from torch import Tensor

from ssd_resnet34.augment import flip_boxes, flip_images
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
        channels = images.permute(0, 3, 1, 2).float() / 255
        channels = jitter_colours(channels, batch.colour_jitter)
        images = channels.permute(0, 2, 3, 1) * 255
        boxes = flip_boxes(boxes, batch.flip)
    return normalise(images, recipe), boxes


def jitter_colours(images: Tensor, colour_jitter: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order.

    `images` (N, 3, H, W) RGB in 0..1; the result may lie outside. `colour_jitter` (N, 4) is as in
    a Batch.
    """
    brightness, contrast, saturation, hue = colour_jitter.view(-1, 4, 1, 1, 1).unbind(1)
    images = images + brightness
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast)
    return change_saturation_and_hue(images, saturation.squeeze(1), hue.squeeze(1))


def change_saturation_and_hue(images: Tensor, factor: Tensor, turns: Tensor) -> Tensor:
    """Multiply the saturation of images (N, 3, H, W) by `factor` and turn their hue by `turns`.

    Both are (N, 1, 1). One conversion to hue, saturation and value (HSV) and back serves both. The
    hue is counted in sectors, sixths of a turn: 0 is red, 2 green, 4 blue.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    scale = torch.where(chroma > 0, 1 / chroma, 0.0)
    sector_if_green = (blue - red) * scale + 2
    sector_if_blue = (red - green) * scale + 4
    sector = torch.where(value == green, sector_if_green, sector_if_blue)
    sector = torch.where(value == red, (green - blue) * scale, sector)

    sector = sector + 6 * turns
    saturation = torch.where(value > 0, chroma / value, 0.0)
    chroma = (saturation * factor).clamp(0, 1) * value

    channels = []
    for sector_offset in (5, 3, 1):  # of red, green, blue
        # From the value to the minimum, as the hue moves away from the channel's own colour.
        distance = (sector + sector_offset).remainder(6)
        fall = torch.minimum(distance, 4 - distance).clamp(0, 1)
        channels.append(value - fall * chroma)
    return torch.stack(channels, dim=1)
