"""Batched augmentation on the device: colour, flip, normalisation.

The colour operations are the original's on float images: nothing is rounded or cut to 0..255. They
scale with the image but for the added brightness, so they are applied to the image times its cover
and leave the canvas around it untouched. Nothing is drawn here: numbers come with the batch.
"""

import torch
from torch import Tensor

from common.npu.device import chunk_size, memory_format
from ssd_mmdet.config import Recipe
from ssd_mmdet.data import Batch, constant, normalise


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Network input (N, 3, S, S) float32, in the device's layout, and boxes (N, M, 4)."""
    if not recipe.augment:
        return normalise(batch.images, recipe), batch.boxes
    parts = (batch.images, batch.place, batch.jitter, batch.order, batch.flip)
    split = (part.split(chunk_size(part)) for part in parts)
    images = torch.cat([_images(*few, recipe) for few in zip(*split, strict=True)])
    left, top, right, bottom = batch.boxes.unbind(-1)
    size = recipe.image_size
    mirrored = torch.stack([size - right, top, size - left, bottom], dim=-1)
    boxes = torch.where(batch.flip.view(-1, 1, 1), mirrored, batch.boxes)
    return images.contiguous(memory_format=memory_format(images.device)), boxes


def cover(place: Tensor, size: int) -> Tensor:
    """How much of each pixel is image (N, size, size), by the weights of bilinear resizing, of
    `place` (N, 2, 3) as a Batch has it: the product of a column's part and a row's."""
    first, end, length = place.unsqueeze(-2).unbind(-1)  # (N, 2, 1)
    pixels = torch.arange(size, dtype=torch.float32, device=place.device)
    center = (pixels + 0.5) * (length / size) - 0.5
    center = torch.minimum(center.clamp(min=0), length - 1)
    across, down = torch.minimum(center - first + 1, end - center).clamp(0, 1).unbind(1)
    return down.unsqueeze(2) * across.unsqueeze(1)


def _images(
    images: Tensor, place: Tensor, jitter: Tensor, order: Tensor, flip: Tensor, recipe: Recipe
) -> Tensor:
    """Network input (N, 3, S, S) of images (N, S, S, 3) times their cover: the mean, which the
    canvas is filled with, becomes 0."""
    part = cover(place, recipe.image_size)
    planes = images.permute(3, 0, 1, 2).float()  # (3, N, S, S): whole planes
    shift, contrast, saturation, hue = jitter.view(-1, 4, 1, 1).unbind(1)
    planes = (planes + shift * part) * contrast
    planes = _saturation_and_hue(planes, saturation, hue)
    images = planes.transpose(0, 1)
    index = order.view(-1, 3, 1, 1).expand_as(images)
    mean = constant(recipe.mean, images.device).view(3, 1, 1)
    images = images.gather(1, index) - mean * part.unsqueeze(1)
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)


def _saturation_and_hue(planes: Tensor, saturation: Tensor, degrees: Tensor) -> Tensor:
    """Saturation (N, 1, 1) times, hue `degrees` (N, 1, 1) more, of (3, N, S, S).

    HSV as OpenCV has it for float images. Where the value is negative, which brightness can make
    it, the conversion and its inverse mirror the other channels on it; so does this.
    """
    red, green, blue = planes
    value, minimum = planes.amax(dim=0), planes.amin(dim=0)
    chroma = value - minimum
    scale = torch.where(chroma > 0, 1 / chroma, 0.0)
    sector = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    sector = sector + degrees / 60
    chroma = chroma * value.sign() * saturation
    shifted = torch.empty_like(planes)
    # Each channel falls from the value to the minimum as its sector leaves the channel's own.
    for plane, own in zip(shifted, (5, 3, 1), strict=True):
        distance = (sector + own).remainder_(6)
        fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        torch.sub(value, fall.mul_(chroma), out=plane)
    return shifted
