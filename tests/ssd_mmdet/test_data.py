import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from common.arithmetic import round_up
from common.coco.index import read_index
from common.errors import UserError
from common.npu.distributed import Ranks
from ssd_mmdet.augment import coverage
from ssd_mmdet.config import RECIPES
from ssd_mmdet.data import (
    TrainingOrder,
    TrainingSet,
    build_loader,
    epoch_order,
    iterations_per_epoch,
    orientation_groups,
    prepare_image,
    training_records,
)

RECIPE = replace(RECIPES["1p"], batch_size=2)
GROUPS = st.tuples(st.integers(1, 30), st.integers(1, 30)).map(
    lambda sizes: [np.arange(sizes[0]), sizes[0] + np.arange(sizes[1])]
)


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, batch=st.integers(1, 8), world=st.integers(1, 4), seed=st.integers(0, 99))
def test_an_epoch_has_every_image_and_batches_of_one_kind(groups, batch, world, seed):
    order = epoch_order(groups, batch, world, seed, epoch=0)
    assert len(order) % (batch * world) == 0
    counts = np.bincount(order, minlength=sum(map(len, groups)))
    assert counts.min() >= 1
    first = len(groups[0])
    kinds = (order < first).reshape(-1, batch)
    assert (kinds.all(axis=1) | ~kinds.any(axis=1)).all()
    for size, drawn in ((first, (order < first).sum()), (len(groups[1]), (order >= first).sum())):
        assert drawn == round_up(size, batch * world)
    assert order.tolist() == epoch_order(groups, batch, world, seed, epoch=0).tolist()


def test_epochs_differ():
    groups = [np.arange(20), np.arange(20, 40)]
    for world in (1, 2):
        orders = {tuple(epoch_order(groups, 4, world, 0, epoch)) for epoch in range(6)}
        assert len(orders) == 6


def keys_of(records, recipe, rank, world_size, start, end):
    ranks = Ranks(rank=rank, world_size=world_size)
    return list(TrainingOrder(records, recipe, ranks, 5, start, end))


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_share_each_epoch_of_repeated_passes(tiny_train, world_size):
    records = training_records(tiny_train)
    per_epoch = iterations_per_epoch(records, RECIPE, world_size)
    groups = orientation_groups(records, RECIPE)
    assert sum(map(len, groups)) == 5 * len(records)
    runs = [keys_of(records, RECIPE, r, world_size, 0, 2 * per_epoch) for r in range(world_size)]
    for epoch in (0, 1):
        keys = [
            key
            for run in runs
            for batch in run[epoch * per_epoch : (epoch + 1) * per_epoch]
            for key in batch
        ]
        order = epoch_order(groups, 2, world_size, 5, epoch)
        expected = [(epoch, p, int(order[p]) % len(records)) for p in range(len(order))]
        assert keys == expected  # rank r has the r-th part
        counts = np.bincount([record for *_, record in keys])
        assert counts.min() >= 5


@pytest.mark.parametrize("start", [0, 7, 140])
def test_a_resumed_order_is_the_rest_of_the_whole(tiny_train, start):
    records = training_records(tiny_train)
    whole = keys_of(records, RECIPE, 1, 2, 0, 160)
    assert keys_of(records, RECIPE, 1, 2, start, 160) == whole[start:]
    assert {len(batch) for batch in whole} == {2}


def test_iterations_of_coco():
    """The published 9162 of eight cards of 8, from the 117266 images of COCO's training set."""
    sizes = np.array([[480, 640]] * 87_000 + [[640, 480]] * 30_266)
    records = type("Records", (), {"sizes": sizes, "__len__": lambda self: len(sizes)})()
    assert iterations_per_epoch(records, RECIPES["8p"], 8) == 9162
    assert iterations_per_epoch(records, RECIPES["1p"], 1) in (73292, 73293)


def test_nothing_to_train_on(tiny_train):
    empty = tiny_train.subset(np.array([], dtype=int))
    with pytest.raises(UserError, match=r"no image .* an annotation and sides of 32 pixels; check"):
        build_loader(RECIPE, empty, True, end=1)


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_do_not_depend_on_workers_or_where_a_run_starts(tiny_train):
    records = training_records(tiny_train)
    whole = list(build_loader(RECIPE, records, True, seed=3, end=4))
    assert len(whole) == 4
    for workers in (1, 2):
        part = list(build_loader(RECIPE, records, True, seed=3, start=1, end=4, workers=workers))
        for batch, expected in zip(part, whole[1:], strict=True):
            assert_same(batch, expected)


def test_augmentation_changes_by_seed_epoch_and_position(tiny_train):
    samples = [
        TrainingSet(tiny_train, RECIPE, seed)[epoch, position, 0]
        for seed, epoch, position in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 3, 2))
    ]
    made = {(sample.images.sum().item(), *sample.colour_jitter.tolist()) for sample in samples}
    assert len(made) == 5
    assert_same(samples[0], TrainingSet(tiny_train, RECIPE, 0)[0, 0, 0])


def test_a_batch_has_fixed_shapes_and_types(tiny_train):
    records = training_records(tiny_train)
    (batch,) = build_loader(RECIPE, records, True, end=1)
    max_boxes = records.max_boxes()
    expected = {
        "images": ((2, 300, 300, 3), torch.uint8),
        "visible_box": ((2, 4), torch.float32),
        "window_size": ((2, 2), torch.float32),
        "boxes": ((2, max_boxes, 4), torch.float32),
        "labels": ((2, max_boxes), torch.int64),
        "valid": ((2, max_boxes), torch.bool),
        "flip": ((2,), torch.bool),
        "colour_jitter": ((2, 4), torch.float32),
        "channel_order": ((2, 3), torch.int64),
        "image_ids": ((2,), torch.int64),
    }
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch._asdict().items()} == expected
    assert max_boxes % 16 == 0
    first = next(iter(TrainingOrder(records, RECIPE, Ranks(), 0, 0, 1)))
    assert batch.image_ids.tolist() == [records.image_ids[record] for *_, record in first]


def test_padding_drops_no_box(tiny_train):
    recipe = replace(RECIPE, augment=False)
    records = training_records(tiny_train)
    dataset = TrainingSet(records, recipe, 0)
    fullest = int(np.argmax([len(dataset.ground_truth(k)[0]) for k in range(len(records))]))
    for record in (fullest, 0, 1):
        boxes, labels, _ = dataset.ground_truth(record)
        sample = dataset[0, 0, record]
        count = len(boxes)
        assert sample.valid.tolist() == [True] * count + [False] * (dataset.max_boxes - count)
        height, width = records.sizes[record]
        scale = np.float32([300 / width, 300 / height] * 2)
        np.testing.assert_allclose(sample.boxes[:count], (boxes * scale).clip(0, 300), rtol=1e-6)
        np.testing.assert_array_equal(sample.labels[:count], labels)


@pytest.fixture
def odd_set(tmp_path):
    """Images and annotations of every kind that the original treats in its own way."""
    sizes = {1: (64, 64), 2: (31, 200), 3: (32, 200), 4: (64, 64), 5: (64, 64), 6: (64, 64)}
    boxes = [  # image, box, further fields
        (1, [-5, 10, 20, 80], {}),  # over the edge: kept, not clipped
        (1, [1, 1, 0.9, 5], {}),  # less than a pixel wide
        (1, [3, 3, 9, 9], {"area": 0}),  # counts as without an area: differs from the original
        (1, [3, 3, 8, 8], {"ignore": 1}),
        (1, [100, 3, 8, 8], {}),  # outside
        (1, [2, 2, 30, 30], {"iscrowd": 1}),
        (1, [4, 5, 1, 1], {"category_id": 9}),
        (2, [0, 0, 10, 10], {}),  # image of 31 rows
        (3, [0, 0, 10, 10], {}),
        (4, [0, 0, 10, 10], {"iscrowd": 1}),  # crowd only
        (5, [7, 7, 20, 20], {}),
    ]
    annotations = [
        {"id": k, "image_id": i, "category_id": 4, "bbox": b, "area": 50, "iscrowd": 0} | more
        for k, (i, b, more) in enumerate(boxes, 1)
    ]
    images = [
        {"id": i, "height": h, "width": w, "file_name": f"{i}.png"} for i, (h, w) in sizes.items()
    ]
    categories = [{"id": 9, "name": "nine"}, {"id": 4, "name": "four"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    for i, (height, width) in sizes.items():
        Image.new("RGB", (width, height), (200, 100, 50)).save(tmp_path / f"{i}.png")
    return read_index(str(tmp_path / "a.json"), str(tmp_path))


def test_which_images_and_boxes_are_trained_on(odd_set):
    records = training_records(odd_set)
    assert records.image_ids.tolist() == [1, 3, 4, 5]
    dataset = TrainingSet(records, RECIPE, 0)
    boxes, labels, crowds = dataset.ground_truth(0)
    assert boxes.tolist() == [[-5, 10, 15, 90], [3, 3, 12, 12], [4, 5, 5, 6]]
    assert [records.class_names[label] for label in labels] == ["four", "four", "nine"]
    assert crowds.tolist() == [[2, 2, 32, 32]]
    boxes, labels, crowds = dataset.ground_truth(2)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)
    assert len(crowds) == 1


def test_an_image_of_crowds_only_is_trained_on_without_boxes(odd_set):
    records = training_records(odd_set)
    dataset = TrainingSet(records, RECIPE, 0)
    for position in range(20):
        sample = dataset[0, position, 2]
        assert not sample.valid.any()
        assert coverage(sample.visible_box[None], sample.window_size[None], 300).max() > 0.5


def test_a_truncated_file_is_named(tmp_path, tiny_train):
    records = training_records(tiny_train).subset(np.array([0]))
    path = tmp_path / records.file_names[0].decode()
    with open(records.path(0), "rb") as file:
        data = file.read()
    path.write_bytes(data[: len(data) // 2])
    records = replace(records, image_dir=str(tmp_path))
    for training in (True, False):
        with pytest.raises(UserError) as error:
            list(build_loader(RECIPE, records, training, end=1))
        assert str(error.value).startswith(
            f"{path}: cannot read the image (image file is truncated"
        )


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


def test_evaluation_input_is_rgb_less_the_mean():
    image = np.zeros((30, 40, 3), np.uint8)
    image[..., 0] = 255
    found = prepare_image(image, RECIPE)
    assert found.shape == (3, 300, 300)
    expected = torch.tensor([255 - 123.675, -116.28, -103.53])
    assert_close(found[:, 7, 9], expected, rtol=0, atol=1e-4)
