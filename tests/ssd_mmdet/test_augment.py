import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from common.coco.images import read_image
from common.coco.index import CocoIndex
from ssd_mmdet import data
from ssd_mmdet.augment import augment, coverage
from ssd_mmdet.config import RECIPES
from ssd_mmdet.data import (
    NO_COLOUR_JITTER,
    Batch,
    TrainingSet,
    draw_channel_order,
    draw_colour_jitter,
    training_records,
)
from ssd_mmdet.geometry import Window, canvas_around, crop_window, cut_and_resize, resize
from tests.ssd_mmdet import reference

SIZE = 60
RECIPE = replace(RECIPES["1p"], image_size=SIZE)
MEAN = torch.tensor(RECIPE.mean).view(3, 1, 1)


@pytest.fixture(scope="module")
def pictures(tiny_train):
    """Photographs and what is hard: noise, greys, black, white, pure colours. (7, 60, 60, 3)"""
    photographs = [resize(read_image(tiny_train.path(k)), SIZE, SIZE) for k in (0, 20)]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIZE, SIZE, 3))
    grey = np.repeat(rng.integers(0, 256, (SIZE, SIZE, 1)), 3, axis=2)
    pure = rng.choice([0, 255], (SIZE, SIZE, 3))
    flat = [np.full((SIZE, SIZE, 3), level) for level in (0, 255)]
    stack = np.stack([*photographs, noise, grey, pure, *flat]).astype(np.uint8)
    return torch.from_numpy(stack)


def batch(
    images,
    jitter=NO_COLOUR_JITTER,
    order=range(3),
    flip=False,
    boxes=None,
    visible_box=(0, 0, 1, 1),
    window_size=(1, 1),
):
    """A batch whose images all get the same values, or each its row of them."""
    count = len(images)
    if boxes is None:
        boxes = torch.zeros(count, 2, 4)
    return Batch(
        images=images,
        visible_box=torch.as_tensor(visible_box, dtype=torch.float32).expand(count, 4),
        window_size=torch.as_tensor(window_size, dtype=torch.float32).expand(count, 2),
        boxes=boxes,
        labels=torch.zeros(boxes.shape[:2], dtype=torch.int64),
        valid=torch.ones(boxes.shape[:2], dtype=torch.bool),
        flip=torch.as_tensor(flip).expand(count),
        colour_jitter=torch.as_tensor(jitter, dtype=torch.float32).expand(count, 4),
        channel_order=torch.as_tensor([*order]).expand(count, 3),
        image_ids=torch.arange(count),
    )


def levels(made):
    """Grey levels (N, H, W, 3) of what `augment` made."""
    return (made[0] + MEAN).permute(0, 2, 3, 1)


def recoloured(image_rgb, shift, contrast, saturation, hue, contrast_first):
    """The original's steps on float BGR, without its draws."""
    image = image_rgb[..., ::-1].astype(np.float32) + np.float32(shift)
    image = image * np.float32(contrast if contrast_first else 1)
    hsv = reference.bgr_to_hsv(image)
    hsv[..., 1] *= np.float32(saturation)
    hsv[..., 0] = (hsv[..., 0] + np.float32(hue)) % 360
    image = reference.hsv_to_bgr(hsv) * np.float32(1 if contrast_first else contrast)
    return image[..., ::-1].copy()


@pytest.mark.parametrize(
    "jitter",
    [
        NO_COLOUR_JITTER,
        (-32.0, 1.0, 1.0, 0.0),
        (32.0, 1.0, 1.0, 0.0),
        (0.0, 1.5, 1.0, 0.0),
        (0.0, 1.0, 0.5, 0.0),
        (0.0, 1.0, 1.5, 0.0),
        (0.0, 1.0, 1.0, -18.0),
        (0.0, 1.0, 1.0, 18.0),
        (-31.0, 0.6, 1.4, 11.0),
        (20.0, 1.3, 0.7, -5.0),
    ],
)
@pytest.mark.parametrize("contrast_first", [True, False])
def test_colour_is_opencvs_wherever_the_contrast_is_drawn(pictures, jitter, contrast_first):
    found = levels(augment(batch(pictures, jitter), RECIPE))
    for image, own in zip(pictures.numpy(), found, strict=True):
        expected = torch.from_numpy(recoloured(image, *jitter, contrast_first))
        assert_close(own, expected, rtol=0, atol=2e-3)


def test_dark_pixels_become_negative_and_are_mirrored_as_in_opencv():
    dark = torch.tensor([10, 20, 5], dtype=torch.uint8).expand(1, SIZE, SIZE, 3)
    (found,) = levels(augment(batch(dark, (-30.0, 1.0, 1.0, 0.0)), RECIPE))
    assert_close(found[0, 0], torch.tensor([0.0, -10.0, 5.0]))  # not -20, -10, -25


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_channels_are_reordered_last(pictures, order):
    jitter = (10.0, 1.2, 1.3, 7.0)
    found = levels(augment(batch(pictures, jitter, order), RECIPE))
    plain = levels(augment(batch(pictures, jitter), RECIPE))
    assert_close(found, plain[..., list(order)], rtol=0, atol=1e-4)


def drawn(pictures):
    """A batch in which every image has its own canvas, flip, numbers and order."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    count = len(pictures)
    jitter = torch.tensor(NO_COLOUR_JITTER) + torch.tensor([20, 0.2, 0.2, 9]) * torch.randn(
        count, 4, generator=generator
    )
    order = torch.rand(count, 3, generator=generator).argsort(dim=1)
    boxes = SIZE * torch.rand(count, 5, 4, generator=generator)
    images = []
    visible_boxes = []
    window_sizes = []
    for picture in pictures.numpy():
        image_left, image_top = rng.integers(-20, 40, 2)
        width, height = rng.integers(70, 120, 2)
        window = Window(-image_left, -image_top, width - image_left, height - image_top)
        image, visible_box = cut_and_resize(picture, window, SIZE)
        images.append(image)
        visible_boxes.append(visible_box)
        window_sizes.append((width, height))
    return batch(
        torch.from_numpy(np.stack(images)),
        jitter,
        flip=torch.arange(count) % 2 == 0,
        boxes=boxes,
        visible_box=np.array(visible_boxes),
        window_size=np.array(window_sizes),
    )._replace(channel_order=order)


def test_colour_leaves_the_canvas_untouched(pictures):
    given = drawn(pictures)
    images, _ = augment(given._replace(flip=torch.zeros(len(pictures), dtype=torch.bool)), RECIPE)
    covered = coverage(given.visible_box, given.window_size, SIZE)
    empty = (covered == 0).unsqueeze(1).expand_as(images)
    assert 0.2 < empty.float().mean() < 0.8
    assert images[empty].eq(0).all()  # the mean, subtracted
    assert images[~empty].abs().mean() > 20


def test_the_seam_between_image_and_canvas(pictures):
    """Colour before pasting and resizing, as the original, on a float canvas filled with mean."""
    image = pictures[0].numpy()
    jitter = (20.0, 1.3, 0.7, -5.0)
    window = Window(left=-13, top=-21, right=133 - 13, bottom=117 - 21)
    resized, visible_box = cut_and_resize(image, window, SIZE)
    given = batch(
        torch.from_numpy(resized[None]), jitter, visible_box=visible_box, window_size=(133, 117)
    )
    canvas = np.empty((117, 133, 3), np.float32)
    canvas[:] = RECIPE.mean
    canvas[21:81, 13:73] = recoloured(image, *jitter, contrast_first=True)
    expected = reference.network_input(canvas, SIZE)
    difference = (augment(given, RECIPE)[0][0] - expected).abs()
    assert difference.mean() < 0.5
    seam = coverage(given.visible_box, given.window_size, SIZE)[0] % 1 != 0
    assert seam.sum() > 20
    assert difference[:, seam].mean() < 2


def test_a_batch_is_its_images(pictures):
    together = drawn(pictures)
    images, boxes = augment(together, RECIPE)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    for n in range(len(pictures)):
        image, box = augment(Batch(*(part[n : n + 1] for part in together)), RECIPE)
        assert torch.equal(image[0], images[n])
        assert torch.equal(box[0], boxes[n])


def test_flip_mirrors_image_and_boxes_and_changes_no_input(pictures):
    boxes = torch.tensor([[6.0, 12, 24, 54], [0, 0, 60, 60]]).expand(2, 2, 4)
    given = batch(pictures[:2], flip=torch.tensor([True, False]), boxes=boxes)
    before = [part.clone() for part in given]
    images, moved = augment(given, RECIPE)
    assert_close(moved[0], torch.tensor([[36.0, 12, 54, 54], [0, 0, 60, 60]]))
    assert torch.equal(moved[1], boxes[1])
    found = levels((images,))
    assert_close(found[0], pictures[0].flip(1).float(), rtol=0, atol=1e-3)
    assert_close(found[1], pictures[1].float(), rtol=0, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_without_augmentation_only_normalisation_remains(pictures):
    given = batch(pictures, flip=True)
    images, boxes = augment(given, replace(RECIPE, augment=False))
    assert torch.equal(boxes, given.boxes)
    assert_close(images, pictures.permute(0, 3, 1, 2) - MEAN, rtol=0, atol=1e-5)


# Distributions: the fast form and the original's exact order draw from the same one.

SAMPLES = 1500


@pytest.fixture(scope="module")
def small_set(tiny_train) -> tuple[CocoIndex, list[np.ndarray]]:
    """The 49 training images and boxes at a quarter of their size, for speed."""
    records = training_records(tiny_train)
    table = records.table.copy()
    table.box_xywh = (table.box_xywh / 4).clip(1)
    images = [read_image(records.path(k))[2::4, 2::4].copy() for k in range(len(records))]
    return replace(records, table=table), images


def statistics(image, boxes, labels):
    """One number each of a sample, whose distributions are compared."""
    canvas = (image.abs() < 1e-3).all(dim=0)
    shown = image[:, ~canvas] if not canvas.all() else image.flatten(1)
    numbers = {
        "canvas": canvas.float().mean().item(),
        "saturation": (shown.amax(dim=0) - shown.amin(dim=0)).mean().item(),
        "boxes": len(boxes),
    }
    for name, plane in zip(("red", "green", "blue"), shown, strict=True):
        numbers |= {f"mean {name}": plane.mean().item(), f"deviation {name}": plane.std().item()}
    if len(boxes):
        left, top, right, bottom = np.asarray(boxes, np.float64).T
        numbers |= {
            "width": (right - left).mean(),
            "height": (bottom - top).mean(),
            "largest": ((right - left) * (bottom - top)).max(),
            "x": (left + right).mean() / 2,
            "y": (top + bottom).mean() / 2,
            "cut": np.mean((left == 0) | (top == 0) | (right == SIZE) | (bottom == SIZE)),
            "label": labels[0],
        }
    return numbers


@pytest.fixture(scope="module")
def both(small_set):
    """The statistics of SAMPLES samples of the product and of the reference, by name."""
    records, images = small_set
    dataset, found = TrainingSet(records, RECIPE, seed=1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.ImageReader, "read", lambda reader, record: images[record])
        for position in range(SAMPLES):
            sample = dataset[0, position, position % len(records)]
            images_, boxes = augment(Batch(*(part.unsqueeze(0) for part in sample)), RECIPE)
            valid = sample.valid
            found.append(statistics(images_[0], boxes[0, valid], sample.labels[valid].numpy()))
    expected = []
    for position in range(SAMPLES):
        record, draws = position % len(records), np.random.RandomState(position)
        truth = images[record], *dataset.ground_truth(record), draws
        expected.append(statistics(*reference.training_sample(*truth, size=SIZE)))
    return [
        {name: np.array([x[name] for x in part if name in x]) for name in part[0] | part[1]}
        for part in (found, expected)
    ]


NAMES = [
    *("canvas", "saturation", "boxes", "width", "height", "largest", "x", "y", "cut", "label"),
    *(f"{what} {name}" for what in ("mean", "deviation") for name in ("red", "green", "blue")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_both_forms_draw_from_the_same_distribution(both, name):
    """Kolmogorov and Smirnov's two-sample test at the 0.1 % level."""
    own, original = (part[name] for part in both)
    assert min(len(own), len(original)) > 0.95 * SAMPLES
    values = np.sort(np.concatenate([own, original]))
    steps = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (own, original)]
    distance = np.abs(steps[0] - steps[1]).max()
    assert distance < 1.95 * (1 / len(own) + 1 / len(original)) ** 0.5


@pytest.mark.slow
def test_the_distributions_are_wide_enough_to_be_told_apart(both):
    """The test above is not blind: it sees a shift by a third of the deviation, or a scale."""
    own, original = (part["mean green"] for part in both)
    for wrong in (own + 0.3 * own.std(), own - 0.3 * own.std(), 2 * own):
        values = np.sort(np.concatenate([wrong, original]))
        steps = [np.searchsorted(np.sort(x), values, "right") / len(x) for x in (wrong, original)]
        assert np.abs(steps[0] - steps[1]).max() > 1.95 * (2 / SAMPLES) ** 0.5


def test_colour_draws_have_the_originals_ranges():
    """Half of the time nothing, else uniform: brightness, contrast, saturation, hue, channels."""
    rng = random.Random(0)
    jitter = np.array([draw_colour_jitter(RECIPE, rng) for _ in range(4000)])
    order = np.array([draw_channel_order(rng) for _ in range(4000)])
    ranges = ((-32, 32, 0), (0.5, 1.5, 1), (0.5, 1.5, 1), (-18, 18, 0))
    for column, (low, high, neutral) in zip(jitter.T, ranges, strict=True):
        drawn = np.sort(column[column != neutral])
        assert len(drawn) / 4000 == pytest.approx(0.5, abs=0.04)
        level = np.linspace(0, 1, len(drawn))
        np.testing.assert_allclose((drawn - low) / (high - low), level, atol=0.045)
    changed = jitter != NO_COLOUR_JITTER
    assert np.abs(np.corrcoef(changed.T) - np.eye(4)).max() < 0.06  # each by itself
    _, counts = np.unique(order, axis=0, return_counts=True)
    # The order that stays is a sixth of the permutations, too.
    np.testing.assert_allclose(np.sort(counts) / 4000, [1 / 12] * 5 + [7 / 12], atol=0.03)


@pytest.mark.slow
def test_crop_and_expand_ratios_are_the_originals(small_set):
    """Over thousands of draws: how often no crop, and the crop's and the canvas' size."""
    records, _ = small_set
    dataset = TrainingSet(records, RECIPE, seed=0)
    sides, whole, ratios = ([], []), [0, 0], ([], [])
    rng, draws = random.Random(0), np.random.RandomState(0)
    for k in range(40 * len(records)):
        boxes, labels, crowds = dataset.ground_truth(k % len(records))
        height, width = records.sizes[k % len(records)] // 4
        everything = np.concatenate([crowds, boxes]).tolist()
        image_window = Window(0, 0, int(width), int(height))
        window = crop_window(image_window, everything, RECIPE, rng)
        blank = np.broadcast_to(np.float32(0), (height, width, 3))
        part, *_ = reference.crop(blank, boxes, labels, crowds, draws)
        found = (height, width) if window is None else (window.height, window.width)
        for which, shape in enumerate((found, part.shape[:2])):
            if tuple(shape) == (height, width):
                whole[which] += 1
            else:
                sides[which].append((shape[0] / height, shape[1] / width))
        canvas = canvas_around(width, height, RECIPE, rng)
        ratios[0].append(canvas.width / width)
        ratios[1].append(reference.expand(blank, boxes, crowds, draws)[0].shape[1] / width)
    count = 40 * len(records)
    assert whole[0] / count == pytest.approx(whole[1] / count, abs=0.04)
    for own, original in (*zip(*(np.array(x).T for x in sides), strict=True), ratios):
        for extreme in (np.min, np.max):  # a range that differs shows here first
            assert extreme(own) == pytest.approx(extreme(original), abs=0.03)
        error = (np.var(own) / len(own) + np.var(original) / len(original)) ** 0.5
        assert np.mean(own) == pytest.approx(np.mean(original), abs=3.3 * error)
        assert np.std(own) == pytest.approx(np.std(original), rel=0.08)
