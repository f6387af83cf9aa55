"""Batched augmentation on the device: colour jitter and normalisation.

Nothing is drawn here: the random numbers come with the batch. The worker has already cropped,
expanded and flipped the image, in the pass that resized it.

The colour operations are OpenCV's on uint8, in the order of the original: each leaves whole grey
levels, and hue and saturation are changed in OpenCV's 8-bit HSV.
"""

import torch
from torch import Tensor

from common.npu.device import chunk_size
from m2det.config import Recipe
from m2det.data import Batch, normalise

HUES = 180  # of a full turn


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the network input (N, 3, H, W) float32 of a batch, and its boxes (N, M, 4).

    The boxes are normalised xyxy.
    """
    images = batch.images.permute(0, 3, 1, 2)  # (N, H, W, 3)
    if recipe.augment:
        # A CPU takes one image at a time, which fits its cache: 33 instead of 82 ms for an image of
        # 512 x 512 pixels.
        step = chunk_size(images)
        changed = []
        for first in range(0, len(images), step):
            chunk = slice(first, first + step)
            changed.append(
                jitter_colours(images[chunk], batch.colour_box[chunk], batch.colour_jitter[chunk])
            )
        images = torch.cat(changed)
    return normalise(images, recipe), batch.boxes


def jitter_colours(images: Tensor, colour_box: Tensor, colour_jitter: Tensor) -> Tensor:
    """Change the colours of images (N, H, W, 3) uint8 RGB inside their box, not of the canvas.

    `colour_box` (N, 4) is xyxy in pixels. `colour_jitter` (N, 4) are the grey levels added, the
    factor of contrast, the hue added (of 180), and the factor of saturation.
    """
    brightness, contrast, hue, saturation = colour_jitter.view(-1, 4, 1, 1).unbind(1)
    # One plane for each channel: the operations read and write contiguous memory.
    planes = images.permute(3, 0, 1, 2).float().contiguous()  # (3, N, H, W)
    planes = (planes + brightness).clamp(0, 255).floor()
    planes = (planes * contrast).clamp(0, 255).floor()
    planes = _change_hue_and_saturation(planes, hue, saturation)
    changed = planes.permute(1, 2, 3, 0).byte()
    is_inside = _pixels_inside(colour_box, images.shape[1])
    return torch.where(is_inside.unsqueeze(3), changed, images)


def _pixels_inside(box: Tensor, size: int) -> Tensor:
    """Return which pixels (N, size, size) have their centre in the box (N, 4) of their image."""
    left, top, right, bottom = box.view(-1, 4, 1).unbind(1)  # (N, 1) each
    center = torch.arange(size, device=box.device) + 0.5
    is_inside_x = (left < center) & (center < right)  # (N, size)
    is_inside_y = (top < center) & (center < bottom)
    return is_inside_y.unsqueeze(2) & is_inside_x.unsqueeze(1)


def _change_hue_and_saturation(planes: Tensor, added_hue: Tensor, factor: Tensor) -> Tensor:
    """Change planes (3, N, H, W) RGB by way of 8-bit HSV, in which hue is 0..179."""
    red, green, blue = planes
    value = planes.amax(dim=0)
    chroma = value - planes.amin(dim=0)
    # Hue in sectors of 60 degrees, times the chroma.
    sector_if_green = blue - red + 2 * chroma
    sector_if_blue = red - green + 4 * chroma
    sector = torch.where(value == green, sector_if_green, sector_if_blue)
    sector = torch.where(value == red, green - blue, sector)
    hue = (sector * (HUES / 6 / chroma.clamp(min=1)) + 0.5).floor()
    saturation = (chroma * (255 / value.clamp(min=1)) + 0.5).floor()

    hue = (hue + added_hue).remainder(HUES)
    saturation = (saturation * factor).clamp(max=255).floor()

    # Back to RGB in closed form: a channel falls from the value by up to the chroma as the hue
    # leaves the two sectors around the channel's own colour.
    sector = hue / (HUES / 6)
    chroma = value * (saturation / 255)
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        distance = (sector + offset).remainder(6)
        fall = torch.minimum(distance, 4 - distance).clamp(0, 1)
        channels.append(value - fall * chroma)
    return torch.stack(channels).floor()
