import random
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import functional as reference

from common.coco.images import read_image
from ssd_resnet34 import augment as module
from ssd_resnet34 import data
from ssd_resnet34.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, augment
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import Batch, TrainingSet, crop_window, resize, training_records

RECIPE = RECIPES["1p"]
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
NEUTRAL = (1.0, 1.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def pictures(tiny_train):
    """Photographs and what is hard: noise, greys, black, white, pure colours. (7, 60, 60, 3)"""
    photographs = [resize(read_image(tiny_train.path(k)), 60).numpy() for k in (0, 20)]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 60, 3))
    grey = np.repeat(rng.integers(0, 256, (60, 60, 1)), 3, axis=2)
    pure = rng.choice([0, 255], (60, 60, 3))
    flat = [np.full((60, 60, 3), level) for level in (0, 255)]
    stack = np.stack([*photographs, noise, grey, pure, *flat]).astype(np.uint8)
    return torch.from_numpy(stack)


def batch(images, colour_jitter=NEUTRAL, operation_order=range(4), flip=False, boxes=None):
    """A batch whose images all get the same jitter, order and flip, or each its row of them."""
    count = len(images)
    boxes = torch.zeros(count, 2, 4) if boxes is None else boxes
    return Batch(
        images,
        boxes,
        torch.zeros(boxes.shape[:2], dtype=torch.int64),
        torch.ones(boxes.shape[:2], dtype=torch.bool),
        torch.as_tensor(flip).expand(count),
        torch.as_tensor(colour_jitter, dtype=torch.float32).expand(count, 4),
        torch.as_tensor([*operation_order]).expand(count, 4),
        torch.arange(count),
    )


def levels(made):
    """Grey levels (N, H, W, 3) of what `augment` made."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (RECIPE.mean, RECIPE.std))
    return ((made[0] * std + mean) * 255).permute(0, 2, 3, 1)


def by_pillow(image, steps):
    picture = Image.fromarray(image.numpy())
    for operation, factor in steps:
        picture = getattr(reference, f"adjust_{OPERATIONS[operation]}")(picture, factor)
    return torch.from_numpy(np.array(picture)).float()


def only(operation, factor):
    return [factor if k == operation else NEUTRAL[k] for k in range(4)]


@pytest.mark.parametrize(
    ("operation", "factor"),
    [
        *((BRIGHTNESS, factor) for factor in (0.875, 1.0, 1.125)),
        *((CONTRAST, factor) for factor in (0.5, 0.9, 1.0, 1.5)),
        *((SATURATION, factor) for factor in (0.5, 0.9, 1.0, 1.5)),
    ],
)
def test_a_blend_is_pillows_to_a_level(pictures, operation, factor):
    found = levels(augment(batch(pictures, only(operation, factor)), RECIPE))
    expected = torch.stack([by_pillow(image, [(operation, factor)]) for image in pictures])
    # The grey that Pillow blends with is whole, ours is not; there is none in brightness.
    limit, bias = (0.01, 0.01) if operation == BRIGHTNESS else (1.01, 0.25)
    assert (found - expected).abs().max() <= limit
    assert (found - expected).mean().abs() <= bias


@pytest.mark.parametrize("turns", [-0.05, -0.02, 0.0, 0.013, 0.05])
def test_hue_is_torchvisions(pictures, turns):
    found = levels(augment(batch(pictures, only(HUE, turns)), RECIPE))
    exact = reference.adjust_hue(pictures.permute(0, 3, 1, 2) / 255, turns).permute(0, 2, 3, 1)
    assert (found - 255 * exact).abs().max() <= 0.51  # half a level of rounding
    for image, own in zip(pictures, found, strict=True):
        # Pillow's hue is rounded to 1/256 of a turn: up to 4 levels of a pure colour.
        assert (own - by_pillow(image, [(HUE, turns)])).abs().mean() <= 2


def test_hue_leaves_grey_alone(pictures):
    found = levels(augment(batch(pictures, only(HUE, 0.05)), RECIPE))
    for k in (3, 5, 6):
        assert_close(found[k], pictures[k].float(), rtol=0, atol=1e-3)


JITTER = (1.1, 0.7, 1.4, 0.04)


@pytest.mark.parametrize("order", [*permutations(range(4))])
def test_every_order(pictures, order):
    found = levels(augment(batch(pictures, JITTER, order), RECIPE))
    photographs = slice(0, 2)
    steps = [(operation, JITTER[operation]) for operation in order]
    for image, own in zip(pictures[photographs], found[photographs], strict=True):
        assert (own - by_pillow(image, steps)).abs().mean() <= 1

    one_by_one = pictures
    for operation, factor in steps:
        made = levels(augment(batch(one_by_one, only(operation, factor)), RECIPE))
        one_by_one = made.round().to(torch.uint8)
    assert_close(found, one_by_one.float(), rtol=0, atol=1e-3)


def drawn(pictures):
    """A batch in which every image has its own flip, factors and order."""
    generator = torch.Generator().manual_seed(0)
    count = len(pictures)
    jitter = torch.tensor(NEUTRAL) + 0.05 * torch.randn(count, 4, generator=generator)
    order = torch.rand(count, 4, generator=generator).argsort(dim=1)
    boxes = torch.rand(count, 5, 4, generator=generator)
    made = batch(pictures, jitter, flip=torch.arange(count) % 2 == 0, boxes=boxes)
    return made._replace(operation_order=order)


def test_a_batch_is_its_images(pictures, monkeypatch):
    together = drawn(pictures)
    images, boxes = augment(together, RECIPE)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    for n in range(len(pictures)):
        image, box = augment(Batch(*(part[n : n + 1] for part in together)), RECIPE)
        assert torch.equal(image[0], images[n])
        assert torch.equal(box[0], boxes[n])
    monkeypatch.setattr(module, "chunk_size", len)  # as on an accelerator
    at_once = levels(augment(together, RECIPE))
    # Sums in another order may move a value across a cut between two levels.
    difference = (at_once - levels((images,))).abs()
    assert difference.max() < 4
    assert difference.mean() < 0.01


def test_flip_turns_image_and_boxes_and_changes_no_input(pictures):
    boxes = torch.tensor([[0.1, 0.2, 0.4, 0.9], [0.0, 0.0, 1.0, 1.0]]).expand(2, 2, 4)
    given = batch(pictures[:2], flip=torch.tensor([True, False]), boxes=boxes)
    before = [part.clone() for part in given]
    images, moved = augment(given, RECIPE)
    assert_close(moved[0], torch.tensor([[0.6, 0.2, 0.9, 0.9], [0.0, 0.0, 1.0, 1.0]]))
    assert torch.equal(moved[1], boxes[1])
    found = levels((images,))
    assert_close(found[0], pictures[0].flip(1).float(), rtol=0, atol=1e-3)
    assert_close(found[1], pictures[1].float(), rtol=0, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_without_augmentation_only_normalisation_remains(pictures):
    given = drawn(pictures)
    images, boxes = augment(given, replace(RECIPE, augment=False))
    assert torch.equal(boxes, given.boxes)
    values = reference.normalize(pictures.permute(0, 3, 1, 2) / 255, RECIPE.mean, RECIPE.std)
    assert_close(images, values, rtol=0, atol=1e-5)


# Distributions: the original's, spec figures measured with its own code on the same images.


def test_distribution_of_the_crop(tiny_train):
    records = training_records(tiny_train)
    dataset = TrainingSet(records, RECIPE, seed=0)
    rng = random.Random(0)
    whole, areas, kept = 0, [], []
    for record in range(len(records)):
        boxes, _ = dataset.ground_truth(record)
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        for _ in range(60):
            window = crop_window(boxes, RECIPE, rng)
            if window is None:
                whole += 1
                continue
            x, y, right, bottom = window
            areas.append((right - x) * (bottom - y))
            inside = ((center > (x, y)) & (center < (right, bottom))).all(axis=1)
            kept.append(inside.mean())
    draws = 60 * len(records)
    assert draws == 2940
    assert whole / draws == pytest.approx(0.55, abs=0.03)
    assert np.mean(areas) == pytest.approx(0.47, abs=0.03)
    assert np.mean(kept) == pytest.approx(0.70, abs=0.03)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.sampled_from([0.1, 0.3, 0.4, float("-inf")]))
def test_a_crop_keeps_its_word(seed, limit):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0.25, 0.3, (3, 2))  # near one another: some window suits them all
    boxes = np.concatenate([corner, corner + rng.uniform(0.4, 0.45, (3, 2))], axis=1)
    boxes = boxes.astype(np.float32)
    window = crop_window(boxes, replace(RECIPE, crop_ious=(limit,)), random.Random(seed))
    x, y, right, bottom = window
    width, height = right - x, bottom - y
    assert 0.3 <= width <= 1
    assert 0.3 <= height <= 1
    assert 0.5 <= width / height <= 2
    assert 0 <= x < right <= 1 + 1e-9
    assert 0 <= y < bottom <= 1 + 1e-9
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert ((center > (x, y)) & (center < (right, bottom))).all(axis=1).any()
    for left, top, r, b in boxes.astype(float):
        shared = max(min(r, right) - max(left, x), 0) * max(min(b, bottom) - max(top, y), 0)
        assert shared / ((r - left) * (b - top) + width * height - shared) > limit


@pytest.fixture(scope="module")
def draws(tiny_train):
    """4000 samples' draws; decoding is left out."""
    recipe = replace(RECIPE, image_size=2, crop_ious=(None,))
    dataset = TrainingSet(training_records(tiny_train), recipe, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        black = np.zeros((4, 4, 3), np.uint8)
        patch.setattr(data.ImageReader, "read", lambda reader, record: black)
        return [dataset[epoch, p, p % 49] for epoch in range(4) for p in range(1000)]


def chi_square(counts, cells):
    expected = sum(counts) / cells
    counts = [*counts, *[0] * (cells - len(counts))]
    return sum((count - expected) ** 2 / expected for count in counts)


def test_distribution_of_flip(draws):
    assert np.mean([sample.flip.item() for sample in draws]) == pytest.approx(0.5, abs=0.03)


def test_distribution_of_jitter(draws):
    jitter = torch.stack([sample.colour_jitter for sample in draws]).numpy()
    spans = np.array([0.125, 0.5, 0.5, 0.05])
    unit = (jitter - NEUTRAL) / spans
    assert np.abs(unit).max() <= 1 + 1e-6
    for column in unit.T:
        counts, _ = np.histogram(column, bins=10, range=(-1 - 1e-6, 1 + 1e-6))
        assert chi_square(counts, 10) < 27.9  # 99.9 % quantile, 9 degrees of freedom
    assert np.abs(np.corrcoef(unit.T) - np.eye(4)).max() < 0.05


def test_distribution_of_order(draws):
    counts = Counter(tuple(sample.operation_order.tolist()) for sample in draws)
    assert set(counts) == set(permutations(range(4)))
    assert chi_square(counts.values(), 24) < 49.7  # 99.9 %, 23 degrees of freedom
