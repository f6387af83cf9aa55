import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.coco.images import read_image
from common.coco.resize import resize_as_opencv
from ssd_mmdet.augment import coverage
from ssd_mmdet.config import RECIPES
from ssd_mmdet.geometry import (
    Window,
    canvas_around,
    crop_window,
    cut_and_resize,
    resize,
)
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
    window = Window(left=30, top=20, right=180, bottom=140)
    resized, visible_box = cut_and_resize(image, window, 100)
    np.testing.assert_array_equal(resized, resize(image[20:140, 30:180], 100, 100))
    assert visible_box == (0, 0, 150, 120)
    assert (covered(visible_box, window, 100) == 1).all()


def covered(visible_box, window, size):
    visible_boxes = torch.tensor([visible_box], dtype=torch.float32)
    window_sizes = torch.tensor([[window.width, window.height]], dtype=torch.float32)
    return coverage(visible_boxes, window_sizes, size)[0].numpy()


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
@example(left=-60, top=0, width=160, height=70, size=16)  # only the image's edge is in the window
def test_cut_is_a_window_of_a_canvas(left, top, width, height, size):
    """`left` and `top` are the corner of the image in the window."""
    image = picture(70, 64)
    window = Window(-left, -top, width - left, height - top)
    made, visible_box = cut_and_resize(image, window, size)
    assert made.dtype == np.uint8
    expected = naive_cut(image, left, top, width, height, size, fill=0)
    difference = np.abs(made - expected)
    assert difference.mean() <= 0.4  # rounding alone makes a quarter of a level
    assert difference.max() <= 1.01 + 255 / 64  # the image lies within 1/64 pixel of its place
    part = naive_cut(np.ones_like(image), left, top, width, height, size, fill=0)[..., 0]
    np.testing.assert_allclose(covered(visible_box, window, size), part, atol=1e-4)
    assert (made[part == 0] == 0).all()


@pytest.mark.parametrize(
    ("window", "visible"),
    [
        (Window(63, 0, 1563, 70), (0, 0, 1, 70)),  # the left edge of the window
        (Window(0, 69, 64, 1569), (0, 0, 64, 1)),  # its top edge
        (Window(-1499, 0, 1, 70), (1499, 0, 1500, 70)),  # right
        (Window(0, -1499, 64, 1), (0, 1499, 64, 1500)),  # bottom
        (Window(-500, -500, 2000, 2000), (500, 500, 564, 570)),  # large enough for some pixels
    ],
)
def test_an_image_may_be_too_narrow_for_any_pixel_of_the_result(window, visible):
    made, visible_box = cut_and_resize(np.full((70, 64, 3), 255, np.uint8), window, 300)
    assert visible_box == visible
    assert made.shape == (300, 300, 3)
    shown = covered(visible_box, window, 300) > 1 / 255
    np.testing.assert_array_equal((made > 0).all(axis=2), shown)


def box_set(seed, count):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(15, 50, (count, 2))], axis=1).astype("f4")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 4), width=st.integers(1, 200))
def test_a_crop_keeps_its_word(seed, count, width):
    boxes = box_set(seed, count)
    limits = []

    class Spy(random.Random):
        def choice(self, values):
            limits.append(super().choice(values))
            return limits[-1]

    canvas = Window(0, 0, width, 120)
    window = crop_window(canvas, boxes.tolist(), RECIPE, Spy(seed))
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


def test_a_crop_of_a_canvas_is_that_of_an_image_of_its_size():
    """A canvas differs from an image in its origin only: the window moves along."""
    boxes = box_set(0, 3)
    shift = np.float32([-17, -40, -17, -40])
    for seed in range(40):
        window = crop_window(Window(0, 0, 130, 120), boxes.tolist(), RECIPE, random.Random(seed))
        moved = crop_window(
            Window(-17, -40, 113, 80), (boxes + shift).tolist(), RECIPE, random.Random(seed)
        )
        if window is None:
            assert moved is None
        else:
            np.testing.assert_array_equal(np.array(window) + shift, moved)


def test_a_canvas_holds_its_image():
    rng = random.Random(0)
    drawn = np.array([canvas_around(200, 100, RECIPE, rng) for _ in range(4000)])
    left, top, right, bottom = drawn.T
    assert (left <= 0).all()
    assert (top <= 0).all()
    assert (right >= 200).all()
    assert (bottom >= 100).all()
    width = right - left
    height = bottom - top
    plain = (width == 200) & (height == 100)
    assert plain.mean() == pytest.approx(0.5, abs=0.03)
    assert (left[plain] == 0).all()
    assert (width[~plain] / 200).mean() == pytest.approx(2.5, abs=0.06)
    assert width.max() <= 800
    assert torch.tensor(drawn).dtype == torch.int64
