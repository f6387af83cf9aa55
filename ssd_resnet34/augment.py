"""Augmentation of a batch on the device: flip, colour jitter, normalisation.

The colour operations are those of Pillow, as torchvision's ColorJitter applies them to a PIL image.
Like Pillow's, each of them rounds down to whole grey levels: without that, images would be 1.4
levels brighter on average. Nothing is drawn here: the loader's workers draw every factor.
"""

import torch
from torch import Tensor

from common.npu.device import chunk_size
from common.npu.operators import constant
from ssd_resnet34.config import Recipe
from ssd_resnet34.data import Batch, normalise

# The operations by number: columns of a batch's `colour_jitter`, values of its `operation_order`.
BRIGHTNESS = 0
CONTRAST = 1
SATURATION = 2
HUE = 3
OPERATIONS = 4
# Of red, green and blue in a grey level: ITU-R BT.601, as in Pillow's mode "L".
GREY_WEIGHTS = (0.299, 0.587, 0.114)
# What takes a hue to the distance from where a channel begins to fall, in sixths of a turn; of red,
# green and blue.
SECTOR_OFFSETS = (5.0, 3.0, 1.0)
MIN_CHROMA = 1e-6  # grey has chroma 0, and any hue


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the network input (N, 3, H, W) float32 of a batch, and its boxes (N, M, 4).

    The boxes are normalised xyxy.
    """
    if not recipe.augment:
        return normalise(batch.images, recipe), batch.boxes
    images = []
    # On a CPU one image at a time, which fits its cache: 13 ms an image, a batch of 32 at once 27.
    for chunk in batch.split(chunk_size(batch.images)):
        flipped = flip_images(chunk.images, chunk.flip)
        images.append(jitter_colours(flipped, chunk.colour_jitter, chunk.operation_order))
    return normalise(torch.cat(images), recipe), flip_boxes(batch.boxes, batch.flip)


def flip_images(images: Tensor, flip: Tensor) -> Tensor:
    """Flip those of the images (N, H, W, 3) left to right for which `flip` (N,) is set."""
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(2), images)


def flip_boxes(boxes_xyxy: Tensor, flip: Tensor) -> Tensor:
    """Flip the normalised boxes (N, M, 4) of those images for which `flip` (N,) is set."""
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    flipped = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
    return torch.where(flip.view(-1, 1, 1), flipped, boxes_xyxy)


def jitter_colours(images: Tensor, colour_jitter: Tensor, operation_order: Tensor) -> Tensor:
    """Apply the four operations to images (N, H, W, 3) in 0..255, to each in its own order.

    `colour_jitter` (N, 4) holds the factors, `operation_order` (N, 4) the operations from first to
    last.

    All images go through the same steps, whatever their order: up to three blends, the shift of
    hue, up to three blends. Where an image's hue comes second, for example, only the first of the
    blends before it and the last two of those behind it change anything.
    """
    channels = images.permute(3, 0, 1, 2)  # (3, N, H, W)
    channels = channels.to(torch.float32, memory_format=torch.contiguous_format)
    positions = torch.arange(OPERATIONS, device=operation_order.device)
    is_hue = operation_order == HUE
    hue_position = (positions * is_hue).sum(dim=1, keepdim=True, dtype=torch.int32)  # (N, 1)
    is_contrast = operation_order == CONTRAST
    is_saturation = operation_order == SATURATION
    # Of the operation at each position, (N, 4). For hue any will do: no blend takes it.
    factors = colour_jitter.gather(1, operation_order.clamp(max=SATURATION))
    no_change = constant(1.0, factors.device)
    factors_before = torch.where(positions < hue_position, factors, no_change)
    factors_behind = torch.where(positions > hue_position, factors, no_change)

    for i in range(OPERATIONS - 1):
        channels = blend(channels, factors_before[:, i], is_contrast[:, i], is_saturation[:, i])
    channels = shift_hue(channels, colour_jitter[:, HUE])
    for i in range(1, OPERATIONS):
        channels = blend(channels, factors_behind[:, i], is_contrast[:, i], is_saturation[:, i])
    return channels.permute(1, 2, 3, 0)


def blend(channels: Tensor, factor: Tensor, is_contrast: Tensor, is_saturation: Tensor) -> Tensor:
    """Change contrast, saturation or else brightness of images (3, N, H, W).

    All three mix the image with another one: brightness with black, contrast with the mean grey
    level, saturation with the grey image. `factor` (N,) is the weight of the image; it stays as it
    is where that is 1. `is_contrast` and `is_saturation` (N,) bool say what is changed.
    """
    factor = factor.view(-1, 1, 1)
    is_contrast = is_contrast.view(-1, 1, 1)
    is_saturation = is_saturation.view(-1, 1, 1)

    weights = constant(GREY_WEIGHTS, channels.device).view(3, 1, 1, 1)
    grey = (channels * weights).sum(dim=0)  # (N, H, W)
    mean_grey_or_black = grey.mean(dim=(1, 2), keepdim=True) * is_contrast
    other = torch.where(is_saturation, grey, mean_grey_or_black)
    return torch.lerp(other, channels, factor).clamp_(0, 255).floor_()


def shift_hue(channels: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of images (3, N, H, W) by `turns` (N,), keeping HSV's saturation and value."""
    red, green, blue = channels
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = chroma.clamp(min=MIN_CHROMA).reciprocal_()
    # The hue in sixths of a turn: 0 is red, 2 green, 4 blue.
    sector_if_green = (blue - red) * scale + 2
    sector_if_blue = (red - green) * scale + 4
    sector = torch.where(value == green, sector_if_green, sector_if_blue)
    sector = torch.where(value == red, (green - blue) * scale, sector)
    sector = sector + 6 * turns.view(-1, 1, 1)

    # From the value to the minimum, as the hue moves away from the channel's own colour.
    offsets = constant(SECTOR_OFFSETS, channels.device).view(3, 1, 1, 1)
    distance = (sector + offsets).remainder_(6)  # (3, N, H, W)
    fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return (value - fall * chroma).round_()
