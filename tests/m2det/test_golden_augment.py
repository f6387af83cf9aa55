"""The golden files of m2det that concern images: evaluation input and augmentation."""

import random
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from common.coco.images import read_image
from common.coco.resize import resize_as_opencv
from m2det import data
from m2det.augment import augment
from m2det.data import Batch, TrainingSet, prepare_image
from m2det.geometry import (
    Canvas,
    Geometry,
    Window,
    crop_window,
    draw_geometry,
    expanded_canvas,
    move_boxes,
)
from tests.golden.fill import probe
from tests.m2det import reference

MEAN = np.array([104, 117, 123], np.float32)
STEPS = range(6)


def record_of(records, image_id):
    return int(np.flatnonzero(records.image_ids == image_id)[0])


@pytest.fixture(scope="module")
def step(golden, tiny_train, recipe):
    """The image of the single steps: BGR, boxes in pixels, labels."""
    record = record_of(tiny_train, golden("augment")["step_image"])
    image = read_image(tiny_train.path(record))
    return image, *TrainingSet(tiny_train, recipe, 0).ground_truth(record)


@pytest.mark.parametrize("size", [512, 320])
@pytest.mark.parametrize("position", [0, 1])
def test_evaluation_input(golden, recipe, tiny_val, position, size):
    expected = golden("preprocess")
    image_id = expected["image_ids"][position]
    image = read_image(tiny_val.path(record_of(tiny_val, image_id)))
    means = image.reshape(-1, 3).mean(axis=0)[::-1]
    assert_allclose(means, expected[f"{image_id}/raw_bgr_mean"], rtol=0, atol=0.5)
    found = probe(prepare_image(image, replace(recipe, image_size=size)).numpy())
    name = f"{image_id}/{size}"
    assert_array_equal(found["index"], expected[f"{name}/index"])
    assert_array_equal(found["shape"], expected[f"{name}/shape"])
    difference = np.abs(found["value"] - expected[f"{name}/value"])
    assert difference.max() <= 1.5
    assert (difference > 1e-3).mean() <= 0.005
    assert_allclose(found["l2"], expected[f"{name}/l2"], rtol=1e-4)


@pytest.mark.parametrize("size", [512, 320, 704])
def test_evaluation_resize_is_opencvs(tiny_val, size):
    for record in range(3):
        image = read_image(tiny_val.path(record))
        assert_array_equal(resize_as_opencv(image, size, size), cv2.resize(image, (size, size)))
    image = np.random.default_rng(0).integers(0, 256, (37, 41, 3)).astype(np.uint8)
    assert_array_equal(resize_as_opencv(image, size, size), cv2.resize(image, (size, size)))


@pytest.mark.parametrize("case", range(6))
def test_training_sample_under_the_originals_draws(golden, recipe, tiny_train, monkeypatch, case):
    expected = golden("augment")
    image_id, seed = expected["exact/cases"][case].tolist()
    name = f"exact/{image_id}_{seed}"
    dataset, record = TrainingSet(tiny_train, recipe, 0), record_of(tiny_train, image_id)
    boxes, _ = dataset.ground_truth(record)
    image = read_image(tiny_train.path(record))
    random.seed(seed)
    made, geometry, colour_jitter = reference.transform(image[..., ::-1], boxes, 512)
    found = probe(made.transpose(2, 0, 1), count=1024)
    difference = np.abs(found["value"] - expected[f"{name}/image/value"])
    assert (difference > 1e-3).mean() <= 0.01
    assert difference.max() <= 2
    assert_allclose(found["l2"], expected[f"{name}/image/l2"], rtol=1e-4)

    with monkeypatch.context() as patch:
        patch.setattr(data, "draw_geometry", lambda *_: geometry)
        patch.setattr(data, "draw_colour_jitter", lambda *_: np.array(colour_jitter))
        sample = dataset[0, 0, record]
    images, moved = augment(Batch(*(part.unsqueeze(0) for part in sample)), recipe)
    targets = expected[f"{name}/targets"]
    assert_allclose(moved[0, sample.valid], targets[:, :4], rtol=0, atol=1e-6)
    assert_array_equal(sample.labels[sample.valid] + 1, targets[:, 4])
    difference = images[0].permute(1, 2, 0).numpy() - made
    assert np.abs(difference).mean() <= 1
    assert np.abs(difference.mean()) <= 0.5


@pytest.mark.parametrize("k", STEPS)
def test_crop_under_the_originals_draws(golden, step, k):
    expected, (image, boxes, labels) = golden("augment"), step
    random.seed(100 + k)
    window = reference.crop(boxes, (image.shape[1], image.shape[0]))
    size = window.width, window.height
    moved, kept = move_boxes(boxes, labels, Geometry(window, Canvas(*size, 0, 0), False, "linear"))
    assert_array_equal((*size[::-1], 3), expected[f"crop/{k}/shape"])
    assert_allclose(moved * np.tile(size, 2), expected[f"crop/{k}/box"], rtol=0, atol=1e-6)
    assert_array_equal(kept + 1, expected[f"crop/{k}/label"])


@pytest.mark.parametrize("k", STEPS)
def test_colour_under_the_originals_draws(golden, recipe, step, k):
    expected = golden("augment")
    random.seed(200 + k)
    colour_jitter = reference.draw_colour_jitter()
    exact = reference.recolour(step[0][..., ::-1], *colour_jitter)
    found = probe(exact, count=512)
    assert_array_equal(found["index"], expected[f"distort/{k}/index"])
    difference = np.abs(found["value"] - expected[f"distort/{k}/value"])
    assert (difference > 0).mean() <= 0.01
    assert difference.max() <= 2

    part = np.ascontiguousarray(step[0][:400, :400])
    batch = batch_of(torch.from_numpy(part), colour_jitter)
    product = augment(batch, recipe)[0][0].permute(1, 2, 0).numpy() + MEAN
    difference = product - exact[:400, :400]
    assert np.abs(difference).mean() <= 0.1
    assert np.abs(difference).max() <= 8  # a hue or saturation step of a saturated colour


def batch_of(image, colour_jitter):
    side = len(image)
    return Batch(
        image.permute(1, 2, 0).unsqueeze(0),
        torch.zeros(1, 1, 4),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 1, dtype=torch.bool),
        torch.tensor([[0.0, 0, side, side]]),
        torch.tensor([colour_jitter], dtype=torch.float32),
        torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("k", STEPS)
def test_expansion_under_the_originals_draws(golden, step, k):
    expected, (image, boxes, labels) = golden("augment"), step
    size = image.shape[1], image.shape[0]
    random.seed(300 + k)
    canvas = reference.expand(size)
    assert_array_equal((canvas.height, canvas.width, 3), expected[f"expand/{k}/shape"])
    means = reference.on_canvas(image[..., ::-1], canvas).mean(axis=(0, 1))
    assert_allclose(means, expected[f"expand/{k}/mean"], rtol=0, atol=0.1)
    moved, _ = move_boxes(boxes, labels, Geometry(Window(0, 0, *size), canvas, False, "linear"))
    assert_allclose(moved * np.tile(canvas[:2], 2), expected[f"expand/{k}/box"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", STEPS)
def test_flip_under_the_originals_draws(golden, step, k):
    expected, (image, boxes, labels) = golden("augment"), step
    size = image.shape[1], image.shape[0]
    random.seed(400 + k)
    flip = bool(random.randrange(2))
    geometry = Geometry(Window(0, 0, *size), Canvas(*size, 0, 0), flip, "linear")
    moved, _ = move_boxes(boxes, labels, geometry)
    assert_allclose(moved * np.tile(size, 2), expected[f"mirror/{k}/box"], rtol=0, atol=1e-6)


# Distributions of the product's own draws.


def deciles(values):
    return np.quantile(values, np.linspace(0, 1, 11))


def assert_deciles(values, expected):
    """The golden README's tolerance; the two ends, extremes of a sample, are left out."""
    tolerance = 0.05 * (expected[-1] - expected[0]) + 0.01
    assert_allclose(deciles(values)[1:-1], expected[1:-1], rtol=0, atol=tolerance)


def test_distribution_of_the_crop(golden, recipe):
    expected, size = golden("augment"), (640, 480)
    boxes, rng = expected["dist/crop_box"], np.random.default_rng(0)
    windows = np.array([crop_window(boxes, *size, recipe, rng) for _ in range(4000)])
    extents = windows[:, 2:] - windows[:, :2]
    cropped = (extents != size).any(axis=1)
    untouched = expected["dist/crop_untouched_fraction"]
    assert 1 - cropped.mean() == pytest.approx(untouched, abs=4 * np.sqrt(0.25 / 2000))
    parts = extents[cropped] / size
    assert_deciles(parts[:, 0], expected["dist/crop_w_deciles"])
    assert_deciles(parts[:, 1], expected["dist/crop_h_deciles"])
    kept = []
    for window, extent in zip(windows, extents, strict=True):
        geometry = Geometry(Window(*window), Canvas(*extent, 0, 0), False, "")
        kept.append(len(move_boxes(boxes, np.zeros(2), geometry)[0]))
    kept = np.array(kept)[cropped]
    error = 4 * np.sqrt(2) * kept.std() / np.sqrt(len(kept))
    assert kept.mean() == pytest.approx(expected["dist/crop_boxes_kept_mean"], abs=error)


def test_distribution_of_the_expansion(golden, recipe):
    expected, rng = golden("augment"), np.random.default_rng(0)
    size = (64, 48)
    drawn = np.array([expanded_canvas(*size, recipe, rng) for _ in range(4000)])
    canvases, places = drawn[:, :2], drawn[:, 2:]
    grown = (canvases != size).any(axis=1)
    untouched = expected["dist/expand_untouched_fraction"]
    assert 1 - grown.mean() == pytest.approx(untouched, abs=4 * np.sqrt(0.25 / 2000))
    assert_deciles(canvases[grown, 0] / 64, expected["dist/expand_w_deciles"])
    assert_deciles(canvases[grown, 1] / 48, expected["dist/expand_h_deciles"])
    margin = canvases[grown] - size
    places = places[grown]
    assert (places >= 0).all()
    assert (places <= margin).all()
    assert_allclose((places / np.maximum(margin, 1)).mean(axis=0), 0.5, rtol=0, atol=0.03)


@pytest.mark.slow
def test_distribution_of_samples(golden, recipe, tiny_train):
    """Boxes and pixels over 8 passes of the training images, as the golden's."""
    expected = golden("augment")
    small = replace(recipe, image_size=64)  # of means and deviations of pixels a fraction
    dataset = TrainingSet(tiny_train, recipe, 0)
    boxes, kept = [], []
    for epoch in range(8):
        for record in range(len(tiny_train)):
            truth, labels = dataset.ground_truth(record)
            if not len(truth):
                continue
            rng = np.random.default_rng((epoch, record))
            size = tuple(tiny_train.sizes[record][::-1].tolist())
            moved, _ = move_boxes(truth, labels, draw_geometry(truth, *size, recipe, rng))
            large = (moved[:, 2:] - moved[:, :2]).min(axis=1, initial=1) > recipe.min_box
            made = moved[large] if large.any() else truth / np.tile(size, 2)
            boxes.append(made)
            kept.append(len(made) / len(truth))
    assert len(kept) == expected["dist/draws"]
    error = 4 * np.sqrt(2) * expected["dist/kept_fraction_sem"]
    assert np.mean(kept) == pytest.approx(expected["dist/kept_fraction_mean"], abs=error)
    sides = np.concatenate([made[:, 2:] - made[:, :2] for made in boxes])
    sides = sides[(sides > 0).all(axis=1)]
    assert_deciles(np.sqrt(sides.prod(axis=1)), expected["dist/sqrt_area_deciles"])
    assert_deciles(np.log(sides[:, 0] / sides[:, 1]), expected["dist/log_aspect_deciles"])

    dataset = TrainingSet(tiny_train, small, 0)
    means, deviations = [], []
    for epoch in range(8):
        for record in range(len(tiny_train)):
            sample = dataset[epoch, record, record]
            images, _ = augment(Batch(*(part.unsqueeze(0) for part in sample)), small)
            means.append(images.mean(dim=(0, 2, 3)).numpy())
            deviations.append(images.std().item())
    error = 4 * np.sqrt(2) * expected["dist/pixel_mean_sem"]
    assert (np.abs(np.mean(means, axis=0) - expected["dist/pixel_mean"]) <= error).all()
    assert np.mean(deviations) == pytest.approx(expected["dist/pixel_std_mean"], rel=0.1)
