import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.coco.images import read_image
from ssd_mmdet.augment import cover
from ssd_mmdet.config import RECIPES
from ssd_mmdet.geometry import canvas_around, crop_window, cut, resize, resize_as_opencv
from tests.ssd_mmdet import reference

RECIPE = RECIPES["1p"]


def picture(height, width, seed=0):
    """Noise over a gradient, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 80, height)[:, None, None]
    return (slope + rng.uniform(0, 50, (height, width, 3))).astype(np.uint8)


@pytest.mark.parametrize("shape", [(480, 640), (300, 300), (50, 900), (37, 41), (1, 1), (2, 700)])
def test_resize_is_the_float_one_to_a_level(shape):
    image = picture(*shape)
    exact = reference.resize(image.astype(np.float32))
    difference = resize(image, 300, 300) - exact
    assert np.abs(difference).max() <= 1.01
    assert abs(difference.mean()) <= 0.1
    difference = resize_as_opencv(image, 300, 300) - exact
    assert np.abs(difference).max() <= 1.01


def test_resizing_axis_by_axis_changes_nothing(tiny_train):
    for image in (read_image(tiny_train.path(3)), picture(77, 612), picture(400, 31)):
        one_axis = (300, image.shape[1]) if len(image) > 300 else (len(image), 300)
        both = resize(image, 300, 300)
        np.testing.assert_array_equal(resize(resize(image, *one_axis), 300, 300), both)


def test_a_whole_image_or_a_crop_is_only_resized():
    image = picture(200, 240)
    made, place = cut(image, -30, -20, 150, 120, 100)
    np.testing.assert_array_equal(made, resize(image[20:140, 30:180], 100, 100))
    assert (covered(place, 100) == 1).all()


def covered(place, size):
    return cover(torch.from_numpy(place[None]), size)[0].numpy()


def naive_cut(image, left, top, width, height, size, fill):
    """The window of a canvas that really is filled."""
    canvas = np.full((height + 400, width + 400, 3), fill, np.float32)
    canvas[200 : 200 + height, 200 : 200 + width] = fill
    start_x, start_y = max(left, -200), max(top, -200)
    part = image[start_y - top :, start_x - left :]
    part = part[: height + 200 - start_y, : width + 200 - start_x]
    canvas[200 + start_y :, 200 + start_x :][: part.shape[0], : part.shape[1]] = part
    return reference.resize(canvas[200 : 200 + height, 200 : 200 + width], size)


@settings(max_examples=150, deadline=None)
@given(
    left=st.integers(-60, 90),
    top=st.integers(-60, 90),
    width=st.integers(1, 160),
    height=st.integers(1, 160),
    size=st.sampled_from([16, 50]),
)
def test_cut_is_a_window_of_a_canvas(left, top, width, height, size):
    image = picture(70, 64)
    made, place = cut(image, left, top, width, height, size)
    assert made.dtype == np.uint8
    assert place.dtype == np.float32
    expected = naive_cut(image, left, top, width, height, size, fill=0)
    difference = np.abs(made - expected)
    assert difference.mean() <= 0.35
    assert difference.max() <= 1.01 + 255 / 64  # the image lies within 1/64 pixel of its place
    part = naive_cut(np.ones_like(image), left, top, width, height, size, fill=0)[..., 0]
    np.testing.assert_allclose(covered(place, size), part, atol=1e-4)
    assert (made[part == 0] == 0).all()


def box_set(seed, count):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(15, 50, (count, 2))], axis=1).astype("f4")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 4), width=st.integers(1, 200))
def test_a_crop_keeps_its_word(seed, count, width):
    boxes, limits = box_set(seed, count), []

    class Spy(random.Random):
        def choice(self, values):
            limits.append(super().choice(values))
            return limits[-1]

    window = crop_window(width, 120, boxes.tolist(), RECIPE, Spy(seed))
    if window is None:
        assert limits[-1] == 1
        return
    left, top, right, bottom = window
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= 120
    assert 0.3 * width - 1 <= right - left
    assert bottom - top >= 0.3 * 120 - 1
    if count:
        assert reference.iou_with(window, boxes).min() >= np.float32(limits[-1]) - 1e-6
        assert reference.centers_inside(np.array(window), boxes).any()


def test_a_canvas_holds_its_image():
    rng = random.Random(0)
    drawn = np.array([canvas_around(200, 100, RECIPE, rng) for _ in range(4000)])
    width, height, left, top = drawn.T
    assert (left + 200 <= width).all()
    assert (top + 100 <= height).all()
    plain = (width == 200) & (height == 100)
    assert plain.mean() == pytest.approx(0.5, abs=0.03)
    assert (left[plain] == 0).all()
    assert (width[~plain] / 200).mean() == pytest.approx(2.5, abs=0.06)
    assert width.max() <= 800
    assert torch.tensor(drawn).dtype == torch.int64
