"""The original's training transform in its own order, on whole float32 images, in numpy.

Slow and literal: what the product's fast form is compared with. `draws` is numpy's legacy generator
(`np.random.RandomState`), whose calls come in the original's order. Images are (H, W, 3) float32
BGR in 0..255, as OpenCV reads them; boxes xyxy in pixels.
"""

import numpy as np
import torch

MEAN_BGR = (103.53, 116.28, 123.675)
SIZE = 300
EPSILON = np.float32(np.finfo(np.float32).eps)


def bgr_to_hsv(image):
    """OpenCV's conversion of float images: hue in degrees, saturation 0..1, value as the image."""
    b, g, r = (image[..., k] for k in range(3))
    value, lowest = image.max(axis=2), image.min(axis=2)
    difference = value - lowest
    saturation = difference / (np.abs(value) + EPSILON)
    scale = np.float32(60) / (difference + EPSILON)
    hue = np.where(
        value == r,
        (g - b) * scale,
        np.where(value == g, (b - r) * scale + 120, (r - g) * scale + 240),
    )
    hue = np.where(hue < 0, hue + 360, hue)
    return np.stack([hue, saturation, value], axis=2).astype(np.float32)


def hsv_to_bgr(hsv):
    hue, saturation, value = (hsv[..., k] for k in range(3))
    hue = hue * np.float32(6 / 360) % np.float32(6)
    sector = np.floor(hue).astype(np.int64) % 6
    part = hue - np.floor(hue)
    shades = np.stack(
        [
            value,
            value * (1 - saturation),
            value * (1 - saturation * part),
            value * (1 - saturation * (1 - part)),
        ]
    )
    table = np.array([[1, 3, 0], [1, 0, 2], [3, 0, 1], [0, 2, 1], [0, 1, 3], [2, 1, 0]])
    planes = [np.take_along_axis(shades, table[sector, k][None], axis=0)[0] for k in range(3)]
    return np.stack(planes, axis=2)


def photometric(image, draws):
    if draws.randint(2):
        image = image + np.float32(draws.uniform(-32, 32))
    mode = draws.randint(2)
    if mode == 1 and draws.randint(2):
        image = image * np.float32(draws.uniform(0.5, 1.5))
    hsv = bgr_to_hsv(image)
    if draws.randint(2):
        hsv[..., 1] *= np.float32(draws.uniform(0.5, 1.5))
    if draws.randint(2):
        hsv[..., 0] += np.float32(draws.uniform(-18, 18))
        hsv[..., 0][hsv[..., 0] > 360] -= 360
        hsv[..., 0][hsv[..., 0] < 0] += 360
    image = hsv_to_bgr(hsv)
    if mode == 0 and draws.randint(2):
        image = image * np.float32(draws.uniform(0.5, 1.5))
    if draws.randint(2):
        image = image[..., draws.permutation(3)]
    return image


def expand(image, boxes, ignored, draws):
    if draws.uniform(0, 1) > 0.5:
        return image, boxes, ignored
    height, width = image.shape[:2]
    ratio = draws.uniform(1, 4)
    canvas = np.empty((int(height * ratio), int(width * ratio), 3), np.float32)
    canvas[:] = MEAN_BGR
    left = int(draws.uniform(0, width * ratio - width))
    top = int(draws.uniform(0, height * ratio - height))
    canvas[top : top + height, left : left + width] = image
    shift = np.array([left, top, left, top], np.float32)
    return canvas, boxes + shift, ignored + shift


def iou_with(patch, boxes):
    patch = np.array(patch, np.float32)
    start, end = np.maximum(boxes[:, :2], patch[:2]), np.minimum(boxes[:, 2:], patch[2:])
    overlap = np.maximum(end - start, 0).prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    union = area + (patch[2:] - patch[:2]).prod() - overlap
    return overlap / np.maximum(union, np.float32(1e-6))


def centers_inside(patch, boxes):
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((center > patch[:2]) & (center < patch[2:])).all(axis=1)


def crop(image, boxes, labels, ignored, draws):
    height, width = image.shape[:2]
    everything = np.concatenate([ignored, boxes])
    while True:
        limit = draws.choice((1, 0.1, 0.3, 0.5, 0.7, 0.9, 0))
        if limit == 1:
            return image, boxes, labels
        for _ in range(50):
            w, h = draws.uniform(0.3 * width, width), draws.uniform(0.3 * height, height)
            if h / w < 0.5 or h / w > 2:
                continue
            left, top = draws.uniform(width - w), draws.uniform(height - h)  # up to 1.0
            patch = np.array((int(left), int(top), int(left + w), int(top + h)))
            if patch[2] == patch[0] or patch[3] == patch[1]:
                continue
            if len(everything):
                if iou_with(patch, everything).min() < limit:
                    continue
                if not centers_inside(patch, everything).any():
                    continue
            inside = centers_inside(patch, boxes)
            low, high = np.tile(patch[:2], 2), np.tile(patch[2:], 2)
            cut = (np.clip(boxes[inside], low, high) - low).astype(np.float32)
            return image[patch[1] : patch[3], patch[0] : patch[2]], cut, labels[inside]


def resize_axis(image, size, axis):
    """OpenCV's INTER_LINEAR for float images, along one axis."""
    length = image.shape[axis]
    place = (np.arange(size) + 0.5) * (length / size) - 0.5
    first = np.floor(place).astype(np.int64)
    part = (place - first).astype(np.float32)
    part[(first < 0) | (first >= length - 1)] = 0
    first = first.clip(0, length - 1)
    shape = [-1 if k == axis else 1 for k in range(3)]
    part = part.reshape(shape)
    second = (first + 1).clip(max=length - 1)
    return image.take(first, axis) * (1 - part) + image.take(second, axis) * part


def resize(image, size=SIZE):
    return resize_axis(resize_axis(image, size, axis=1), size, axis=0)


def network_input(image_rgb, size=SIZE):
    """(3, size, size) float32 of an image (H, W, 3) float32 RGB: resized, mean subtracted."""
    made = resize(image_rgb, size) - np.array(MEAN_BGR[::-1])
    return torch.from_numpy(made.astype(np.float32)).permute(2, 0, 1).contiguous()


def training_sample(image_rgb, boxes, labels, ignored, draws, size=SIZE):
    """The whole transform: network input (3, size, size), boxes, labels; uint8 RGB (H, W, 3) in."""
    image = image_rgb[..., ::-1].astype(np.float32)
    image = photometric(image, draws)
    image, boxes, ignored = expand(image, boxes, ignored, draws)
    image, boxes, labels = crop(image, boxes, labels, ignored, draws)
    height, width = image.shape[:2]
    made = network_input(image[..., ::-1], size)
    boxes = (boxes * np.array([size / width, size / height] * 2, np.float32)).clip(0, size)
    if draws.choice(["horizontal", None], p=[0.5, 0.5]):
        made = made.flip(2)
        boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], axis=1)
    return made, boxes, labels
