import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from common.errors import UserError
from common.npu.distributed import Ranks
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import (
    NormalisedWindow,
    TrainingOrder,
    TrainingSet,
    apply_crop,
    build_loader,
    epoch_order,
    iterations_per_epoch,
    prepare_image,
    resize,
    training_records,
)

ROOT = Path(__file__).parents[2]
RECIPE = replace(RECIPES["1p"], batch_size=2)
SETS = {
    "length": st.integers(1, 60),
    "batch_size": st.integers(1, 8),
    "world_size": st.integers(1, 5),
}


def order_of(length, batch_size, rank, world_size, start, end):
    ranks = Ranks(rank=rank, world_size=world_size)
    recipe = replace(RECIPE, batch_size=batch_size)
    # Of the records an order needs nothing but their number.
    return list(TrainingOrder(range(length), recipe, ranks, 5, start, end))


@settings(max_examples=50, deadline=None)
@given(**SETS, epoch=st.integers(0, 90))
def test_an_epoch_is_a_seeded_permutation_extended_from_its_beginning(
    length, batch_size, world_size, epoch
):
    order = epoch_order(length, batch_size, world_size, seed=7, epoch=epoch).tolist()
    multiple = batch_size * world_size
    generator = torch.Generator().manual_seed(7 + epoch)
    assert order[:length] == torch.randperm(length, generator=generator).tolist()
    assert len(order) % multiple == 0
    assert len(order) - length < multiple
    assert order[length:] == [order[k % length] for k in range(length, len(order))]


def test_epochs_differ():
    orders = {tuple(epoch_order(40, 4, 2, 0, epoch).tolist()) for epoch in range(6)}
    assert len(orders) == 6


@settings(max_examples=50, deadline=None)
@given(**SETS)
def test_ranks_share_each_epoch(length, batch_size, world_size):
    recipe = replace(RECIPE, batch_size=batch_size)
    per_epoch = iterations_per_epoch(range(length), recipe, world_size)
    step = batch_size * world_size
    runs = [
        order_of(length, batch_size, r, world_size, 0, 2 * per_epoch) for r in range(world_size)
    ]
    for epoch in (0, 1):
        keys = [
            key
            for run in runs
            for batch in run[epoch * per_epoch : (epoch + 1) * per_epoch]
            for key in batch
        ]
        order = epoch_order(length, batch_size, world_size, seed=5, epoch=epoch).tolist()
        assert sorted(keys) == [
            (epoch, position, order[position]) for position in range(len(order))
        ]
        assert {record for *_, record in keys} == set(range(length))
    # The same images make up a step, however many ranks share it.
    alone = order_of(length, step, 0, 1, 0, 2 * per_epoch)
    shared = [sorted(key for run in runs for key in run[k]) for k in range(2 * per_epoch)]
    assert shared == alone


@settings(max_examples=50, deadline=None)
@given(**SETS, start=st.integers(0, 40))
def test_a_resumed_order_is_the_rest_of_the_whole(length, batch_size, world_size, start):
    whole = order_of(length, batch_size, world_size - 1, world_size, 0, 40)
    assert order_of(length, batch_size, world_size - 1, world_size, start, 40) == whole[start:]
    assert {len(batch) for batch in whole} == {batch_size}


def test_nothing_to_train_on(tiny_train):
    empty = tiny_train.subset(np.array([], dtype=int))
    with pytest.raises(UserError, match="no image of the training set has an annotation"):
        build_loader(RECIPE, empty, True, end=1)


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_do_not_depend_on_workers_ranks_or_where_a_run_starts(tiny_train):
    records = training_records(tiny_train)
    whole = list(build_loader(RECIPE, records, True, seed=3, end=4))
    assert len(whole) == 4
    for workers in (1, 2):
        part = list(build_loader(RECIPE, records, True, seed=3, start=1, end=4, workers=workers))
        for batch, expected in zip(part, whole[1:], strict=True):
            assert_same(batch, expected)
    single = replace(RECIPE, batch_size=1)
    for rank in (0, 1):
        ranks = Ranks(rank=rank, world_size=2)
        for n, batch in enumerate(build_loader(single, records, True, ranks=ranks, seed=3, end=3)):
            assert_same(batch, (part[rank : rank + 1] for part in whole[n]))


def test_augmentation_changes_by_seed_epoch_and_position(tiny_train):
    samples = [
        TrainingSet(tiny_train, RECIPE, seed)[epoch, position, 0]
        for seed, epoch, position in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert len({tuple(sample.colour_jitter.tolist()) for sample in samples}) == 4
    assert_same(samples[0], TrainingSet(tiny_train, RECIPE, 0)[0, 0, 0])


def test_a_batch_has_fixed_shapes_and_types(tiny_train):
    records = training_records(tiny_train)
    (batch,) = build_loader(RECIPE, records, True, end=1)
    max_boxes = records.max_boxes()
    expected = {
        "images": ((2, 300, 300, 3), torch.uint8),
        "boxes": ((2, max_boxes, 4), torch.float32),
        "labels": ((2, max_boxes), torch.int64),
        "valid": ((2, max_boxes), torch.bool),
        "flip": ((2,), torch.bool),
        "colour_jitter": ((2, 4), torch.float32),
        "operation_order": ((2, 4), torch.int64),
        "image_ids": ((2,), torch.int64),
    }
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch._asdict().items()} == expected
    assert max_boxes % 16 == 0
    ids = [records.image_ids[record] for *_, record in order_of_first(len(records))]
    assert batch.image_ids.tolist() == ids


def order_of_first(length):
    return next(iter(TrainingOrder(range(length), RECIPE, Ranks(), 0, 0, 1)))


def test_padding_drops_no_box(tiny_train):
    recipe = replace(RECIPE, augment=False, image_size=8)
    records = training_records(tiny_train)
    fullest = int(np.diff(records.offsets).argmax())
    dataset = TrainingSet(records, recipe, 0)
    for record in (fullest, 0, 1):
        boxes, labels = dataset.ground_truth(record)
        sample = dataset[0, 0, record]
        count = len(boxes)
        assert count == np.diff(records.offsets)[record]
        assert sample.valid.tolist() == [True] * count + [False] * (dataset.max_boxes - count)
        np.testing.assert_array_equal(sample.boxes[:count], boxes)
        np.testing.assert_array_equal(sample.labels[:count], labels)


def test_ground_truth_is_normalised_xyxy_with_crowds_and_without_empty_boxes(tiny_val):
    crowded = int(np.flatnonzero(tiny_val.image_ids == 87038)[0])
    rows = tiny_val.annotations(crowded)
    assert rows.crowd.any()
    boxes, labels = TrainingSet(tiny_val, RECIPE, 0).ground_truth(crowded)
    height, width = tiny_val.sizes[crowded]
    x, y, w, h = rows.box_xywh.T
    expected = np.stack([x / width, y / height, (x + w) / width, (y + h) / height], axis=1)
    np.testing.assert_allclose(boxes, expected, rtol=1e-6)
    np.testing.assert_array_equal(labels, rows.label)

    flat = replace(tiny_val, table=tiny_val.table.copy())
    first, second = flat.annotations(crowded)[:2]
    first.box_xywh[2] = second.box_xywh[3] = 0
    boxes, labels = TrainingSet(flat, RECIPE, 0).ground_truth(crowded)
    np.testing.assert_allclose(boxes, expected[2:], rtol=1e-6)
    np.testing.assert_array_equal(labels, rows.label[2:])


def test_training_records_have_annotations(tiny_train, tiny_val):
    for index in (tiny_train, tiny_val):
        counts = np.diff(index.offsets)
        records = training_records(index)
        assert len(records) == (counts > 0).sum()
        np.testing.assert_array_equal(records.image_ids, index.image_ids[counts > 0])


def test_a_crop_cuts_image_and_boxes():
    image = np.arange(20 * 10 * 3, dtype=np.uint8).reshape(20, 10, 3)
    boxes = np.array([[0.2, 0.3, 0.6, 0.7], [0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 1, 1]], np.float32)
    window = NormalisedWindow(0.25, 0.25, 0.79, 0.88)
    cut, moved, labels = apply_crop(image, boxes, np.array([5, 6, 7]), window)
    assert apply_crop(image[:1], boxes, np.array([5, 6, 7]), window)[0].shape[0] == 1
    np.testing.assert_array_equal(cut, image[5:17, 2:7])
    assert labels.tolist() == [5, 7]
    expected = [
        [0, 0.05 / 0.63, 0.35 / 0.54, 0.45 / 0.63],
        [0.25 / 0.54, 0.25 / 0.63, 1, 1],
    ]
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert moved.dtype == np.float32


@pytest.fixture
def truncated(tmp_path, tiny_train):
    """A set of one image, whose file ends in the middle."""
    records = training_records(tiny_train).subset(np.array([0]))
    path = tmp_path / records.file_names[0].decode()
    with open(records.path(0), "rb") as file:
        data = file.read()
    path.write_bytes(data[: len(data) // 2])
    return replace(records, image_dir=str(tmp_path)), path


@pytest.mark.parametrize("training", [True, False])
def test_a_truncated_file_is_named(truncated, training):
    records, path = truncated
    with pytest.raises(UserError) as error:
        list(build_loader(RECIPE, records, training, end=1))
    assert str(error.value).startswith(f"{path}: cannot read the image (image file is truncated")


SCRIPT = """
import common
from common.coco.index import read_index
from common.npu import entry
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import build_loader, training_records

records = training_records(read_index({annotations!r}, {images!r}))
entry.run(lambda: list(build_loader(RECIPES["quickstart"], records, True, workers=2, end=20)))
"""


def test_a_truncated_file_ends_a_run_with_workers_at_once(tmp_path, tiny_train):
    folder = tmp_path / "train2017"
    shutil.copytree(tiny_train.image_dir, folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-20_000])
    script = SCRIPT.format(annotations=tiny_train.annotation_file, images=str(folder))
    command = [sys.executable, "-c", script]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert made.returncode == 1
    assert made.stderr.startswith(f"error: {folder}{os.sep}")
    assert "cannot read the image (image file is truncated" in made.stderr
    assert made.stderr.count("\n") == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_every_image_once(tiny_val, world_size):
    few = tiny_val.subset(np.arange(8))
    recipe = replace(RECIPE, eval_batch_size=3)
    seen = {}
    for rank in range(world_size):
        ranks = Ranks(rank=rank, world_size=world_size)
        for images, sizes, image_ids in build_loader(recipe, few, False, ranks=ranks):
            assert images.shape[1:] == (300, 300, 3)
            for image_id, size in zip(image_ids.tolist(), sizes.tolist(), strict=True):
                assert image_id not in seen
                seen[image_id] = size
    assert seen == dict(zip(few.image_ids.tolist(), few.sizes.tolist(), strict=True))


@pytest.mark.parametrize("shape", [(480, 640), (300, 300), (50, 900), (37, 41)])
def test_resize_is_pillows_to_a_level(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    expected = np.array(Image.fromarray(image).resize((300, 300), Image.Resampling.BILINEAR))
    found = resize(image, 300).numpy()
    difference = np.abs(found.astype(int) - expected)
    assert found.shape == (300, 300, 3)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_evaluation_input_is_normalised_rgb():
    image = np.zeros((30, 40, 3), np.uint8)
    image[..., 0] = 255
    found = prepare_image(image, RECIPE)
    assert found.shape == (3, 300, 300)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert_close(found[:, 7, 9], expected, rtol=0, atol=1e-5)
