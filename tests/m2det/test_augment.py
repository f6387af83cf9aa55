from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from common.coco.images import read_image
from common.coco.resize import resize_as_opencv
from m2det import augment as module
from m2det.augment import augment
from m2det.config import RECIPES
from m2det.data import Batch, draw_colour_jitter
from m2det.geometry import Canvas
from m2det.resample import render
from tests.m2det import reference

RECIPE = RECIPES["320_vgg"]
NEUTRAL = (0.0, 1.0, 0.0, 1.0)
FILL = RECIPE.mean[::-1]  # RGB


@pytest.fixture(scope="module")
def pictures(tiny_train):
    """Photographs and what is hard: noise, greys, black, white, pure colours. (7, 60, 60, 3)"""
    photographs = [resize_as_opencv(read_image(tiny_train.path(k)), 60, 60) for k in (0, 20)]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 60, 3))
    grey = np.repeat(rng.integers(0, 256, (60, 60, 1)), 3, axis=2)
    pure = rng.choice([0, 255], (60, 60, 3))
    flat = [np.full((60, 60, 3), level) for level in (0, 255)]
    return torch.from_numpy(np.stack([*photographs, noise, grey, pure, *flat]).astype(np.uint8))


def batch(images, colour_jitter=NEUTRAL, colour_box=(0.0, 0.0, 60.0, 60.0)):
    """A batch whose images all get the same, or each its row of `colour_jitter`, `colour_box`."""
    count = len(images)
    return Batch(
        images.permute(0, 2, 3, 1),
        torch.rand(count, 2, 4),
        torch.zeros(count, 2, dtype=torch.int64),
        torch.ones(count, 2, dtype=torch.bool),
        torch.as_tensor(colour_box).expand(count, 4),
        torch.as_tensor(colour_jitter, dtype=torch.float32).expand(count, 4),
        torch.arange(count),
    )


def levels(made):
    """Grey levels (N, H, W, 3) RGB of what `augment` made."""
    mean = torch.tensor(RECIPE.mean).view(3, 1, 1)
    return (made[0] + mean).permute(0, 2, 3, 1).flip(3)


@pytest.mark.parametrize(
    "colour",
    [
        NEUTRAL,
        *((added, 1.0, 0, 1.0) for added in (-32.0, -3.7, 12.3, 31.9)),
        *((0.0, factor, 0, 1.0) for factor in (0.5, 0.93, 1.5)),
        *((0.0, 1.0, hue, 1.0) for hue in (-18, 5, 18)),
        *((0.0, 1.0, 0, factor) for factor in (0.5, 1.2, 1.5)),
        (10.5, 1.3, -7, 0.8),
    ],
)
def test_colours_are_opencvs(pictures, colour):
    found = levels(augment(batch(pictures, colour), RECIPE))
    added, factor, hue, saturation = colour
    for own, image in zip(found, pictures, strict=True):
        exact = reference.recolour(image.numpy()[..., ::-1], added, factor, int(hue), saturation)
        difference = own.numpy() - exact[..., ::-1].astype(np.float32)
        assert np.abs(difference).mean() <= 0.35
        assert (np.abs(difference) > 1).mean() <= 0.02


def test_the_canvas_keeps_its_colour(pictures):
    colour_box = (10.0, 20.0, 40.4, 50.6)
    found = levels(augment(batch(pictures, (20.0, 1.0, 0, 1.0), colour_box), RECIPE))
    whole = levels(augment(batch(pictures, (20.0, 1.0, 0, 1.0)), RECIPE))
    inside = torch.zeros(60, 60, dtype=torch.bool)
    inside[20:51, 10:40] = True
    assert torch.equal(found[:, inside], whole[:, inside])
    assert torch.equal(found[:, ~inside], pictures[:, ~inside].float())


def test_a_batch_is_its_images_and_no_input_changes(pictures, monkeypatch):
    rng = np.random.default_rng(0)
    colour_jitter = torch.tensor(np.array([draw_colour_jitter(RECIPE, rng) for _ in pictures]))
    colour_box = 60 * torch.rand(len(pictures), 4).sort(dim=1).values
    together = batch(pictures, colour_jitter, colour_box)
    before = [part.clone() for part in together]
    images, boxes = augment(together, RECIPE)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(boxes, together.boxes)
    for n in range(len(pictures)):
        (alone,), _ = augment(Batch(*(part[n : n + 1] for part in together)), RECIPE)
        assert torch.equal(alone, images[n])
    monkeypatch.setattr(module, "chunk_size", len)  # as on an accelerator
    assert torch.equal(augment(together, RECIPE)[0], images)
    assert all(torch.equal(a, b) for a, b in zip(together, before, strict=True))


def test_without_augmentation_only_normalisation_remains(pictures):
    given = batch(pictures, (20.0, 1.3, 5, 0.7))
    found = levels(augment(given, replace(RECIPE, augment=False)))
    assert_close(found, pictures.float())


def test_distribution_of_colours():
    rng = np.random.default_rng(0)
    drawn = np.array([draw_colour_jitter(RECIPE, rng) for _ in range(8000)])
    changed = drawn != NEUTRAL
    changed[:, 2] |= rng.random(8000) < 0.5 / 37  # a shift of 0 is one of 37
    assert np.abs(changed.mean(axis=0) - 0.5).max() < 0.025
    assert np.abs(np.corrcoef(changed.T) - np.eye(4)).max() < 0.05
    for column, low, high in zip(drawn.T, (-32, 0.5, -18, 0.5), (32, 1.5, 18, 1.5), strict=True):
        values = column[column != NEUTRAL[0]] if low < 0 else column[column != 1]
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    assert set(drawn[:, 2]) == set(range(-18, 19))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", RECIPE.interpolations)
def test_rendering_is_opencvs_to_a_level(tiny_train, method, flip):
    """Crop, canvas, flip and resize, larger and smaller, in OpenCV one after another."""
    rng = np.random.default_rng(0)
    image = read_image(tiny_train.path(0))
    for width, height, grown, size in (
        (200, 170, 1.0, 64), (200, 170, 1.0, 320), (90, 160, 2.3, 128), (150, 60, 3.4, 300),
        (128, 128, 1.0, 128), (64, 64, 2.0, 64),
    ):  # fmt: skip
        cut = np.ascontiguousarray(image[10 : 10 + height, 20 : 20 + width])
        canvas_width = int(grown * width)
        canvas_height = int(grown * 0.9 * height) if grown > 1 else height
        left = int(rng.integers(canvas_width - width + 1))
        top = int(rng.integers(canvas_height - height + 1))
        canvas = Canvas(canvas_width, canvas_height, left, top)
        found = render(cut, canvas, size, method, flip, FILL).permute(2, 0, 1).numpy()
        whole = reference.on_canvas(cut[..., ::-1], canvas)
        whole = whole[:, ::-1] if flip else whole
        exact = cv2.resize(
            np.ascontiguousarray(whole),
            (size, size),
            interpolation=reference.INTERPOLATIONS[method],
        )
        difference = found.astype(int) - exact[..., ::-1]
        assert np.abs(difference).max() <= 1
        assert np.abs(difference).mean() <= 0.15
