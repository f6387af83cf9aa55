"""The resampler against the definition of each method, on a canvas filled pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.coco.resize import resize_as_opencv
from m2det.geometry import Canvas
from m2det.resample import make_taps, render

FILL = (123, 117, 104)
SIDE = st.integers(1, 40)


def linear(x):
    return np.maximum(1 - np.abs(x), 0)


def cubic(x):
    x, a = np.abs(x), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def lanczos(x):
    return np.where(np.abs(x) < 4, np.sinc(x) * np.sinc(x / 4), 0)


KERNELS = {"linear": linear, "cubic": cubic, "lanczos": lanczos}


def matrix(canvas, size, method):
    """Weights (size, canvas) in float64."""
    step, out = canvas / size, np.arange(size)[:, None]
    pixels = np.arange(canvas)
    if method == "nearest":
        return (pixels == np.floor(out * step)).astype(float)
    if method == "area":
        covered = np.minimum(pixels + 1, (out + 1) * step) - np.maximum(pixels, out * step)
        return np.maximum(covered, 0) / step
    # Pixels beside the canvas are its edge's.
    reach = np.arange(-5, canvas + 5)
    weights = KERNELS[method]((out + 0.5) * step - 0.5 - reach)
    made = np.zeros((size, canvas))
    np.add.at(made.T, reach.clip(0, canvas - 1), weights.T)
    return made / made.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("method", ["nearest", "linear", "cubic", "lanczos", "area"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rendering_is_the_weighted_sum_of_a_filled_canvas(method, data):
    width, height, size = data.draw(SIDE), data.draw(SIDE), data.draw(st.integers(1, 48))
    around = [data.draw(st.integers(0, 3 * side)) for side in (width, height)]
    left, top = (data.draw(st.integers(0, margin)) for margin in around)
    canvas = Canvas(width + around[0], height + around[1], left, top)
    if method == "area":
        size = min(size, canvas.width, canvas.height)
    flip = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    image = rng.integers(0, 256, (height + 2, width + 2, 3)).astype(np.uint8)[1:-1, 1:-1]

    whole = np.empty((canvas.height, canvas.width, 3))
    whole[:] = FILL
    whole[top : top + height, left : left + width] = image
    whole = whole[:, ::-1] if flip else whole
    rows = matrix(canvas.height, size, method)
    columns = matrix(canvas.width, size, method)
    exact = np.einsum("yh,hwc,xw->xcy", rows, whole, columns, optimize=True).clip(0, 255)

    found = render(image, canvas, size, method, flip, FILL)
    assert found.shape == (size, 3, size)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy() - exact).max() <= 0.5 + 1e-3


@settings(max_examples=60, deadline=None)
@given(canvas=st.integers(1, 2000), size=st.integers(1, 800))
def test_weights_add_up(canvas, size):
    methods = ["nearest", "linear", "cubic", "lanczos", "area_linear"]
    for method in methods + ["area"] * (size <= canvas):
        positions, weights = make_taps(canvas, size, method)
        assert positions.min() >= 0
        assert positions.max() < canvas
        assert (np.diff(positions, axis=0) >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-5)
        if method in KERNELS:
            centre = (np.arange(size) + 0.5) * canvas / size - 0.5
            first = math.floor(centre[-1]) - weights.shape[1] // 2 + 1
            exact = KERNELS[method](centre[-1] - first - np.arange(weights.shape[1]))
            np.testing.assert_allclose(weights[-1], exact / exact.sum(), rtol=0, atol=1e-5)


def test_nothing_given_is_changed():
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    before = image.copy()
    canvas = Canvas(60, 70, 3, 4)
    for method in ("nearest", "linear", "cubic", "lanczos", "area"):
        first = render(image, canvas, 64, method, False, FILL)
        assert torch.equal(render(image, canvas, 64, method, False, FILL), first)
    resize_as_opencv(image, 64, 64)
    np.testing.assert_array_equal(image, before)
