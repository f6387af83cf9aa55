"""Batched augmentation on the device: colour, normalisation.

The colour operations are OpenCV's on uint8: each leaves whole grey levels, and hue and saturation
pass through its 8-bit HSV. Nothing is drawn here: factors come with the batch. Crop, expansion and
mirror were done by the worker, in the pass that resized.
"""

import torch
from torch import Tensor

from common.npu.device import chunk_size
from m2det.config import Recipe
from m2det.data import Batch, normalise


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Network input (N, 3, H, W) float32 and boxes (N, M, 4) of a batch."""
    images = batch.images.permute(0, 3, 1, 2)  # (N, H, W, 3)
    if recipe.augment:
        at_once = chunk_size(images)
        parts = (x.split(at_once) for x in (images, batch.picture, batch.colour))
        images = torch.cat([_recolour(*part) for part in zip(*parts, strict=True)])
    return normalise(images, recipe), batch.boxes


def _recolour(images: Tensor, picture: Tensor, colour: Tensor) -> Tensor:
    """Images (N, H, W, 3) uint8 RGB with the colour of the picture changed, not of its canvas."""
    added, factor, hue, saturation = colour.view(-1, 4, 1, 1).unbind(1)  # (N, 1, 1) each
    planes = images.permute(3, 0, 1, 2).float().contiguous()  # (3, N, H, W): whole planes
    planes.add_(added).clamp_(0, 255).floor_()
    planes.mul_(factor).clamp_(0, 255).floor_()
    changed = _change_hsv(planes, hue, saturation)

    left, top, right, bottom = picture.view(-1, 4, 1).unbind(1)  # (N, 1) each
    at = torch.arange(images.shape[1], device=images.device) + 0.5  # centres of rows and columns
    seen_x, seen_y = (left < at) & (at < right), (top < at) & (at < bottom)
    inside = seen_y.unsqueeze(2) & seen_x.unsqueeze(1)  # (N, H, W)
    return torch.where(inside.unsqueeze(3), changed.permute(1, 2, 3, 0).byte(), images)


def _change_hsv(planes: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Planes (3, N, H, W) RGB through 8-bit HSV, hue in 0..179, and back."""
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    sector = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    turn = (sector * (30 / chroma.clamp(min=1)) + 0.5).floor_()
    depth = (chroma * (255 / value.clamp(min=1)) + 0.5).floor_()

    sixth = (turn + hue).remainder_(180).div_(30)
    depth = (depth * saturation).clamp_(max=255).floor_()
    chroma = value * depth.div_(255)
    changed = torch.empty_like(planes)
    # Each channel falls from the value to the minimum as the hue leaves the channel's own.
    for plane, own in zip(changed, (5, 3, 1), strict=True):
        distance = (sixth + own).remainder_(6)
        fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        torch.sub(value, fall.mul_(chroma), out=plane)
    return changed.floor_()
