"""Batched augmentation on the device: flip, colour jitter, normalisation.

The colour operations are Pillow's (torchvision's ColorJitter on PIL images). Like Pillow's, each
leaves whole grey levels: without its cuts, images would be 1.4 levels brighter on average. Nothing
is drawn here: factors come with the batch.
"""

import torch
from torch import Tensor

from common.npu.device import chunk_size
from ssd_resnet34.config import Recipe
from ssd_resnet34.data import Batch, normalise

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's "L"


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Network input (N, 3, H, W) float32, channels last, and boxes (N, M, 4) of a batch."""
    images, boxes = batch.images, batch.boxes
    if recipe.augment:
        flip = batch.flip
        at_once = chunk_size(images)
        parts = (x.split(at_once) for x in (images, flip, batch.jitter, batch.order))
        images = torch.cat(
            [_recolour(_flipped(x, f), j, o) for x, f, j, o in zip(*parts, strict=True)]
        )
        left, top, right, bottom = boxes.unbind(-1)
        mirrored = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
        boxes = torch.where(flip.view(-1, 1, 1), mirrored, boxes)
    return normalise(images, recipe), boxes


def _flipped(images: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(2), images)


def _recolour(images: Tensor, jitter: Tensor, order: Tensor) -> Tensor:
    """The four operations on (N, H, W, 3) in 0..255, each image in its own order.

    Three of them are blends with another image. So all images go through blend, hue, blend
    together; a blend on the other side of an image's hue has factor 1 there.
    """
    planes = images.permute(3, 0, 1, 2).float().contiguous()  # (3, N, H, W): whole planes
    place = torch.arange(4, device=order.device)
    hue_place = (place * (order == HUE)).sum(dim=1)  # (N,)
    for k in (0, 1, 2):
        planes = _blend(planes, order[:, k], jitter, active=hue_place > k)
    planes = _shift_hue(planes, jitter[:, HUE].view(-1, 1, 1))
    for k in (1, 2, 3):
        planes = _blend(planes, order[:, k], jitter, active=hue_place < k)
    return planes.permute(1, 2, 3, 0)


def _blend(planes: Tensor, operation: Tensor, jitter: Tensor, active: Tensor) -> Tensor:
    """Brightness (blend with black), contrast (with the mean grey) or saturation (with the grey
    image) of (3, N, H, W), by image; unchanged where not active."""
    factor = jitter.gather(1, operation.clamp(max=SATURATION).unsqueeze(1)).squeeze(1)
    factor = torch.where(active, factor, 1.0).view(-1, 1, 1)
    grey = planes[0] * _LUMA[0] + planes[1] * _LUMA[1] + planes[2] * _LUMA[2]  # (N, H, W)
    operation = operation.view(-1, 1, 1)
    mean = grey.mean(dim=(1, 2), keepdim=True) * (operation == CONTRAST)
    other = torch.where(operation == SATURATION, grey, mean)
    return torch.lerp(other, planes, factor).clamp_(0, 255).floor_()


def _shift_hue(planes: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of (3, N, H, W) by `turns` (N, 1, 1), keeping saturation and value."""
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = 1 / chroma.clamp(min=1e-6)
    sector = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    sector = sector + 6 * turns
    shifted = torch.empty_like(planes)
    # Each channel falls from the value to the minimum as its sector leaves the channel's own.
    for plane, own in zip(shifted, (5, 3, 1), strict=True):
        distance = (sector + own).remainder_(6)
        fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        torch.sub(value, fall.mul_(chroma), out=plane)
    return shifted.round_()
