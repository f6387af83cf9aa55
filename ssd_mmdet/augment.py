"""Batched augmentation on the device: colour jitter, flip and normalisation.

Nothing is drawn here: the random numbers come with the batch.

The original changes colours before it puts an image on a canvas of the mean colour and resizes it.
Here the image comes already resized, black where the canvas shows. All colour operations but the
added brightness are proportional to the image, so they can follow the resizing: brightness and mean
are multiplied by the coverage of each pixel, which leaves the canvas at 0. As in the original,
which computes in floats, nothing is rounded or cut to 0..255.
"""

import torch
from torch import Tensor

from common.npu.device import memory_format
from common.npu.operators import constant
from ssd_mmdet.config import Recipe
from ssd_mmdet.data import Batch, normalise

# What takes a hue to the distance from where a channel begins to fall, in sectors of 60 degrees; of
# red, green and blue.
SECTOR_OFFSETS = (5.0, 3.0, 1.0)


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the network input (N, 3, S, S) float32 in the device's layout, and boxes (N, M, 4).

    Boxes are xyxy in pixels of the network input.
    """
    if not recipe.augment:
        return normalise(batch.images, recipe), batch.boxes
    covered = coverage(batch.visible_box, batch.window_size, recipe.image_size)
    # Each colour lies together: operators on every third number are slower, and an NPU copies them
    # first.
    planes = batch.images.permute(3, 0, 1, 2)  # (3, N, S, S)
    planes = planes.to(torch.float32, memory_format=torch.contiguous_format)
    planes = jitter_colours(planes, covered, batch.colour_jitter, batch.channel_order)
    mean = constant(recipe.mean, planes.device).view(3, 1, 1, 1)
    planes = planes - mean * covered
    planes = torch.where(batch.flip.view(-1, 1, 1), planes.flip(3), planes)
    images = planes.transpose(0, 1).contiguous(memory_format=memory_format(planes.device))
    return images, flip_boxes(batch.boxes, batch.flip, recipe.image_size)


def flip_boxes(boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Flip the boxes (N, M, 4) xyxy of those images left to right for which `flip` (N,) is true."""
    left, top, right, bottom = boxes.unbind(-1)
    flipped = torch.stack([size - right, top, size - left, bottom], dim=-1)
    return torch.where(flip.view(-1, 1, 1), flipped, boxes)


def coverage(visible_box: Tensor, window_size: Tensor, size: int) -> Tensor:
    """Return how much of each pixel (N, size, size) shows the image, from 0 to 1.

    `visible_box` (N, 4) xyxy is the part of the window that the image covers and `window_size`
    (N, 2) the window's width and height, both in pixels before resizing. The coverage is what
    bilinear resizing makes of 1 in the image and 0 outside: a column's times a row's.
    """
    start = visible_box[:, :2].unsqueeze(-1)  # (N, 2, 1), x and y
    end = visible_box[:, 2:].unsqueeze(-1)
    length = window_size.unsqueeze(-1)
    pixel = torch.arange(size, dtype=torch.float32, device=visible_box.device)
    center = (pixel + 0.5) * (length / size) - 0.5
    center = torch.minimum(center.clamp(min=0), length - 1)
    covered = torch.minimum(center - start + 1, end - center).clamp(0, 1)  # (N, 2, size)
    columns, rows = covered.unbind(1)
    return rows.unsqueeze(2) * columns.unsqueeze(1)


def jitter_colours(
    planes: Tensor, covered: Tensor, colour_jitter: Tensor, channel_order: Tensor
) -> Tensor:
    """Change brightness, contrast, saturation, hue and order of channels (3, N, S, S) in 0..255.

    `covered` (N, S, S) is the coverage; `colour_jitter` (N, 4) are the grey levels added, the
    factors of contrast and saturation, and the degrees of hue added; `channel_order` (N, 3) says
    which channel each channel of the result is.
    """
    brightness, contrast, saturation, hue = colour_jitter.view(-1, 4, 1, 1).unbind(1)
    planes = (planes + brightness * covered) * contrast
    return _change_saturation_and_hue(planes, saturation, hue, channel_order)


def _change_saturation_and_hue(
    planes: Tensor, factor: Tensor, degrees: Tensor, channel_order: Tensor
) -> Tensor:
    """Multiply the saturation of channels (3, N, S, S), turn their hue and change their order.

    `factor` and `degrees` are (N, 1, 1). HSV is defined as in OpenCV for float images. Brightness
    can make a value negative; OpenCV's conversion and its inverse then reflect the other channels
    about the value, and so does this.
    """
    red, green, blue = planes.unbind(0)  # (N, S, S) each
    value = planes.amax(dim=0)
    chroma = value - planes.amin(dim=0)
    zero = constant(0.0, planes.device)
    inverse_chroma = torch.where(chroma > 0, chroma.reciprocal(), zero)
    # Hue in sectors of 60 degrees.
    hue = torch.where(
        value == red,
        (green - blue) * inverse_chroma,
        torch.where(
            value == green,
            (blue - red) * inverse_chroma + 2,
            (red - green) * inverse_chroma + 4,
        ),
    )
    hue = hue + degrees / 60
    chroma = chroma * value.sign() * factor
    # The inverse in closed form: a channel falls from the value by up to the chroma as the hue
    # leaves the two sectors around the channel's own colour.
    offsets = constant(SECTOR_OFFSETS, planes.device).expand_as(channel_order)
    offset = offsets.gather(1, channel_order).T.unsqueeze(-1).unsqueeze(-1)
    distance = (hue + offset).remainder(6)  # (3, N, S, S)
    fall = torch.minimum(distance, 4 - distance).clamp(0, 1)
    return value - fall * chroma
