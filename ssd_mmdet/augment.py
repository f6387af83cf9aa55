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
from ssd_mmdet.config import Recipe
from ssd_mmdet.data import Batch, constant, normalise


def augment(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the network input (N, 3, S, S) float32 in the device's layout, and boxes (N, M, 4).

    Boxes are xyxy in pixels of the network input.
    """
    if not recipe.augment:
        return normalise(batch.images, recipe), batch.boxes
    covered = coverage(batch.visible_box, batch.window_size, recipe.image_size).unsqueeze(1)
    images = batch.images.permute(0, 3, 1, 2).float()  # (N, 3, S, S)
    images = jitter_colours(images, covered, batch.colour_jitter)
    channel = batch.channel_order.view(-1, 3, 1, 1).expand_as(images)
    images = images.gather(1, channel)
    mean = constant(recipe.mean, images.device).view(3, 1, 1)
    images = images - mean * covered
    images = torch.where(batch.flip.view(-1, 1, 1, 1), images.flip(3), images)
    images = images.contiguous(memory_format=memory_format(images.device))
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


def jitter_colours(images: Tensor, covered: Tensor, colour_jitter: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of images (N, 3, S, S) in 0..255.

    `covered` (N, 1, S, S) is the coverage; `colour_jitter` (N, 4) are the grey levels added, the
    factors of contrast and saturation, and the degrees of hue added.
    """
    brightness, contrast, saturation, hue = colour_jitter.view(-1, 4, 1, 1, 1).unbind(1)
    images = (images + brightness * covered) * contrast
    return _change_saturation_and_hue(images, saturation.squeeze(1), hue.squeeze(1))


def _change_saturation_and_hue(images: Tensor, factor: Tensor, degrees: Tensor) -> Tensor:
    """Multiply the saturation of images (N, 3, S, S) and turn their hue.

    `factor` and `degrees` are (N, 1, 1). HSV is defined as in OpenCV for float images. Brightness
    can make a value negative; OpenCV's conversion and its inverse then reflect the other channels
    about the value, and so does this.
    """
    red, green, blue = images.unbind(1)  # (N, S, S) each
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    inverse_chroma = torch.where(chroma > 0, 1 / chroma, 0.0)
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
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        distance = (hue + offset).remainder(6)
        fall = torch.minimum(distance, 4 - distance).clamp(0, 1)
        channels.append(value - fall * chroma)
    return torch.stack(channels, dim=1)
