import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from common.errors import UserError
from common.npu.distributed import Ranks
from m2det import data
from m2det.config import RECIPES
from m2det.data import (
    TrainingOrder,
    TrainingSet,
    build_loader,
    epoch_order,
    find_files,
    iterations_per_epoch,
    prepare_image,
    read_records,
)
from m2det.geometry import Canvas, Geometry, crop_window, move_boxes

RECIPE = replace(RECIPES["320_vgg"], image_size=64, batch_size=2)
SETS = {
    "length": st.integers(1, 60),
    "batch_size": st.integers(1, 8),
    "world_size": st.integers(1, 5),
}


# Layouts


def slim(annotations, image_ids):
    """The part of a COCO file that concerns these images."""
    return {
        "categories": annotations["categories"],
        "images": [image for image in annotations["images"] if image["id"] in image_ids],
        "annotations": [a for a in annotations["annotations"] if a["image_id"] in image_ids],
    }


@pytest.fixture(scope="module")
def coco2014(tmp_path_factory, tiny_train, tiny_val):
    """The sample in the layout of 2014: train2014 and valminusminival2014 make up train."""
    folder = tmp_path_factory.mktemp("coco2014")
    (folder / "annotations").mkdir()
    ids = tiny_train.image_ids.tolist()
    for name, index, image_ids, place in (
        ("train2014", tiny_train, ids[:30], "train2014"),
        ("valminusminival2014", tiny_train, ids[30:], "val2014"),
        ("minival2014", tiny_val, tiny_val.image_ids.tolist(), "val2014"),
    ):
        with open(index.annotation_file) as file:
            part = slim(json.load(file), set(image_ids))
        (folder / "images" / place).mkdir(parents=True, exist_ok=True)
        for image in part["images"]:
            source = f"{index.image_dir}/{image['file_name']}"
            image["file_name"] = f"COCO_{place}_{image['id']:012d}.jpg"
            shutil.copy(source, folder / "images" / place / image["file_name"])
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(part))
    return folder


def test_both_layouts_are_the_same_data(coco2014, tiny_train, tiny_val):
    for split, expected in (("train", tiny_train), ("val", tiny_val)):
        found = read_records(find_files(str(coco2014), split))
        assert found.class_names == expected.class_names
        order = {image_id: i for i, image_id in enumerate(found.image_ids.tolist())}
        assert len(order) == len(expected)
        own, theirs = (TrainingSet(records, RECIPE, 0) for records in (found, expected))
        for i, image_id in enumerate(expected.image_ids.tolist()):
            for a, b in zip(own.ground_truth(order[image_id]), theirs.ground_truth(i), strict=True):
                np.testing.assert_array_equal(a, b)
            with open(found.path(order[image_id]), "rb") as a, open(expected.path(i), "rb") as b:
                assert a.read() == b.read()
    subset = found.subset(np.array([3, 1]))
    assert subset.image_ids.tolist() == found.image_ids[[3, 1]].tolist()


def test_the_layout_of_2017_is_found(tiny_val):
    folder = tiny_val.image_dir.rsplit("/", 1)[0]
    for split in ("train", "val"):
        expected = (f"{folder}/annotations/instances_{split}2017.json", f"{folder}/{split}2017")
        assert find_files(folder, split) == [(*expected, "COCO 2017")]


def test_files_can_be_named_one_by_one(tiny_val):
    folder = tiny_val.image_dir.rsplit("/", 1)[0]
    found = find_files("", "train", tiny_val.annotation_file, tiny_val.image_dir)
    assert found == [(tiny_val.annotation_file, tiny_val.image_dir, "as named")]
    found = find_files(folder, "train", annotations=tiny_val.annotation_file)
    assert found[0].annotation_file == tiny_val.annotation_file
    assert found[0].image_dir == f"{folder}/train2017"


def test_without_a_path_the_seeds_place_is_looked_at(coco2014, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coco").symlink_to(coco2014)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file, folder, layout = find_files("", "val")[0]
    assert layout == "COCO 2014"
    assert file == f"{tmp_path}/data/coco/annotations/instances_minival2014.json"
    assert folder == f"{tmp_path}/data/coco/images/val2014"
    monkeypatch.chdir(coco2014)
    assert find_files("", "val") == [
        ("./annotations/instances_minival2014.json", "./images/val2014", "COCO 2014")
    ]


def test_neither_layout_is_one_clear_line(tmp_path):
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError) as error:
        find_files(str(tmp_path), "train")
    line = str(error.value)
    assert "\n" not in line
    assert "instances_train2017.json" in line
    assert "--train_annotations" in line


def test_parts_with_other_categories_are_refused(coco2014, tmp_path):
    shutil.copytree(coco2014, tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "instances_valminusminival2014.json"
    part = json.loads(path.read_text())
    part["categories"][0]["name"] = "wombat"
    path.write_text(json.dumps(part))
    with pytest.raises(UserError, match="wombat"):
        read_records(find_files(str(tmp_path / "coco"), "train"))


# Order


def order_of(length, batch_size, rank, world_size, start, end):
    ranks = Ranks(rank=rank, world_size=world_size)
    recipe = replace(RECIPE, batch_size=batch_size)
    # Of the records an order needs nothing but their number.
    return list(TrainingOrder(range(length), recipe, ranks, 5, start, end))


@settings(max_examples=50, deadline=None)
@given(**SETS, epoch=st.integers(0, 90))
def test_an_epoch_is_a_seeded_permutation_whose_rest_is_dropped(
    length, batch_size, world_size, epoch
):
    order = epoch_order(length, batch_size, world_size, seed=7, epoch=epoch).tolist()
    generator = torch.Generator().manual_seed(7 + epoch)
    permutation = torch.randperm(length, generator=generator).tolist()
    multiple = batch_size * world_size
    if length < multiple:
        assert order == [permutation[k % length] for k in range(multiple)]
    else:
        assert order == permutation[: length // multiple * multiple]


@settings(max_examples=50, deadline=None)
@given(**SETS)
def test_ranks_share_each_epoch(length, batch_size, world_size):
    per_epoch = iterations_per_epoch(
        range(length), replace(RECIPE, batch_size=batch_size), world_size
    )
    step = batch_size * world_size
    runs = [
        order_of(length, batch_size, r, world_size, 0, 2 * per_epoch) for r in range(world_size)
    ]
    for epoch in (0, 1):
        batches = [run[epoch * per_epoch : (epoch + 1) * per_epoch] for run in runs]
        keys = [key for batch in batches for part in batch for key in part]
        order = epoch_order(length, batch_size, world_size, seed=5, epoch=epoch).tolist()
        assert sorted(keys) == [(epoch, k, order[k]) for k in range(len(order))]
    # The same images make up a step, however many ranks share it.
    alone = order_of(length, step, 0, 1, 0, 2 * per_epoch)
    assert [sorted(key for run in runs for key in run[k]) for k in range(2 * per_epoch)] == alone


@settings(max_examples=50, deadline=None)
@given(**SETS, start=st.integers(0, 40))
def test_a_resumed_order_is_the_rest_of_the_whole(length, batch_size, world_size, start):
    whole = order_of(length, batch_size, world_size - 1, world_size, 0, 40)
    assert order_of(length, batch_size, world_size - 1, world_size, start, 40) == whole[start:]
    assert {len(batch) for batch in whole} == {batch_size}


def test_nothing_to_train_on(tiny_train):
    with pytest.raises(UserError, match="no image"):
        build_loader(RECIPE, tiny_train.subset(np.array([], dtype=int)), True, end=1)


# Samples


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_do_not_depend_on_workers_ranks_or_where_a_run_starts(tiny_train):
    whole = list(build_loader(RECIPE, tiny_train, True, seed=3, end=4))
    assert len(whole) == 4
    for workers in (1, 2):
        part = list(build_loader(RECIPE, tiny_train, True, seed=3, start=1, end=4, workers=workers))
        for batch, expected in zip(part, whole[1:], strict=True):
            assert_same(batch, expected)
    single = replace(RECIPE, batch_size=1)
    for rank in (0, 1):
        ranks = Ranks(rank=rank, world_size=2)
        loader = build_loader(single, tiny_train, True, ranks=ranks, seed=3, end=4)
        for n, batch in enumerate(loader):
            assert_same(batch, (part[rank : rank + 1] for part in whole[n]))


def test_augmentation_changes_by_seed_epoch_and_position(tiny_train):
    samples = [
        TrainingSet(tiny_train, RECIPE, seed)[epoch, position, 0]
        for seed, epoch, position in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert len({sample.images.float().mean().item() for sample in samples}) == 4
    assert_same(samples[0], TrainingSet(tiny_train, RECIPE, 0)[0, 0, 0])


def test_a_batch_has_fixed_shapes_and_types(tiny_train):
    (batch,) = build_loader(RECIPE, tiny_train, True, end=1)
    max_boxes = tiny_train.max_boxes()
    expected = {
        "images": ((2, 64, 3, 64), torch.uint8),
        "boxes": ((2, max_boxes, 4), torch.float32),
        "labels": ((2, max_boxes), torch.int64),
        "valid": ((2, max_boxes), torch.bool),
        "colour_box": ((2, 4), torch.float32),
        "colour_jitter": ((2, 4), torch.float32),
        "image_ids": ((2,), torch.int64),
    }
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch._asdict().items()} == expected
    assert max_boxes % 16 == 0


def test_ground_truth_is_the_originals_with_crowds(tiny_val):
    crowded = int(np.flatnonzero(tiny_val.image_ids == 87038)[0])
    rows = tiny_val.annotations(crowded)
    assert rows.crowd.any()
    boxes, labels = TrainingSet(tiny_val, RECIPE, 0).ground_truth(crowded)
    height, width = tiny_val.sizes[crowded]
    expected = []
    for x, y, w, h in rows.box_xywh:
        x1, y1 = max(0, x), max(0, y)
        x2, y2 = min(width - 1, x1 + max(0, w - 1)), min(height - 1, y1 + max(0, h - 1))
        expected.append([x1, y1, x2, y2])
    np.testing.assert_array_equal(boxes, expected)
    np.testing.assert_array_equal(labels, rows.label)


def one_image(tiny_train, boxes_xywh):
    """The first image with these boxes."""
    records = tiny_train.subset(np.array([0]))
    table = np.repeat(records.table[:1], len(boxes_xywh)).view(np.recarray)
    table.box_xywh = np.array(boxes_xywh, float).reshape(-1, 4)
    table.area = 9.0
    return replace(records, table=table, offsets=np.array([0, len(boxes_xywh)]))


def test_an_image_without_boxes_is_only_resized(tiny_train):
    dataset = TrainingSet(one_image(tiny_train, []), RECIPE, 0)
    for position in range(8):
        sample = dataset[0, position, 0]
        assert not sample.valid.any()
        assert sample.colour_box.eq(0).all()  # no colour either
    assert len({dataset[0, p, 0].images.float().mean().item() for p in range(60)}) == 5


def test_where_no_box_is_left_the_image_stays_as_it_is(tiny_train):
    """The original does so, with all boxes; those below a pixel would have an infinite target."""
    records = one_image(tiny_train, [[50, 60, 2.5, 3], [80, 90, 1, 40]])
    height, width = records.sizes[0]
    dataset = TrainingSet(records, RECIPE, 0)
    for position in range(30):
        sample = dataset[0, position, 0]
        if sample.colour_box.eq(0).all():
            break
    box = torch.tensor([50 / width, 60 / height, 51.5 / width, 62 / height])
    assert_close(sample.boxes[sample.valid], box.float().unsqueeze(0))


def test_every_box_is_large_enough_to_learn(tiny_train):
    records = one_image(tiny_train, [[50, 60, 1, 1], [80, 90, 1.2, 40], [5, 5, 100, 100]])
    dataset = TrainingSet(records, RECIPE, 0)
    for position in range(30):
        sample = dataset[0, position, 0]
        boxes = sample.boxes[sample.valid]
        assert len(boxes) == 1
        assert (boxes[:, 2:] - boxes[:, :2] > 0.002).all()


def test_without_augmentation(tiny_train):
    recipe = replace(RECIPE, augment=False)
    dataset = TrainingSet(tiny_train, recipe, 0)
    for record in (0, 1, int(np.diff(tiny_train.offsets).argmax())):
        boxes, labels = dataset.ground_truth(record)
        sample = dataset[3, 5, record]
        assert_same(sample, dataset[0, 0, record])
        scale = np.tile(tiny_train.sizes[record][::-1], 2)
        assert_close(sample.boxes[sample.valid], torch.from_numpy(boxes / scale).float())
        assert sample.labels[sample.valid].tolist() == labels.tolist()


def test_a_box_follows_its_pixels(tiny_train, monkeypatch):
    """Through crop, expansion and flip: a white box in a black image is where the box says."""
    records = one_image(tiny_train, [[101, 81, 121, 101]])
    height, width = records.sizes[0].tolist()
    image = np.zeros((height, width, 3), np.uint8)
    image[81:182, 101:222] = 255
    monkeypatch.setattr(data.ImageReader, "read", lambda reader, record: image)
    dataset = TrainingSet(records, replace(RECIPE, image_size=200), 0)
    for position in range(25):
        sample = dataset[0, position, 0]
        bright = sample.images.float().mean(dim=1) > 200
        columns, rows = bright.any(dim=1).nonzero(), bright.any(dim=0).nonzero()
        found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 200
        assert (found - sample.boxes[0]).abs().max() < 0.025


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.sampled_from([0.1, 0.3, 0.4, float("-inf")]))
def test_a_crop_keeps_its_word(seed, limit):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0.25, 0.3, (3, 2))  # near one another: some window suits them all
    boxes = np.concatenate([corner, corner + rng.uniform(0.4, 0.45, (3, 2))], axis=1)
    boxes *= (320, 240, 320, 240)
    window = crop_window(boxes, 320, 240, replace(RECIPE, crop_ious=(limit,)), rng)
    left, top, right, bottom = window
    width, height = right - left, bottom - top
    assert 0 <= left < right <= 320
    assert 0 <= top < bottom <= 240
    assert 0.3**2 * 320 * 240 - 320 - 240 <= width * height <= 320 * 240
    for x1, y1, x2, y2 in boxes:
        shared = max(min(x2, right) - max(x1, left), 0) * max(min(y2, bottom) - max(y1, top), 0)
        assert shared / ((x2 - x1) * (y2 - y1) + width * height - shared) >= limit
    geometry = Geometry(window, Canvas(width, height, 0, 0), False, "linear")
    moved, kept = move_boxes(boxes, np.arange(3), geometry)
    assert len(kept) >= 1
    assert (moved >= 0).all()
    assert (moved <= 1).all()


# Evaluation


@pytest.fixture
def truncated(tmp_path, tiny_train):
    """A set of one image, whose file ends in the middle."""
    records = tiny_train.subset(np.array([0]))
    path = tmp_path / records.file_names[0].decode()
    with open(records.path(0), "rb") as file:
        content = file.read()
    path.write_bytes(content[: len(content) // 2])
    return replace(records, image_dir=str(tmp_path)), path


@pytest.mark.parametrize("training", [True, False])
def test_a_truncated_file_is_named(truncated, training):
    records, path = truncated
    with pytest.raises(UserError) as error:
        list(build_loader(RECIPE, records, training, end=1))
    assert str(error.value).startswith(f"{path}: cannot read the image (image file is truncated")


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_every_image_once(tiny_val, world_size):
    few = tiny_val.subset(np.arange(8))
    recipe = replace(RECIPE, eval_batch_size=3)
    seen = {}
    for rank in range(world_size):
        ranks = Ranks(rank=rank, world_size=world_size)
        for images, sizes, image_ids in build_loader(recipe, few, False, ranks=ranks):
            assert images.shape[1:] == (64, 64, 3)
            seen |= dict(zip(image_ids.tolist(), sizes.tolist(), strict=True))
    assert seen == dict(zip(few.image_ids.tolist(), few.sizes.tolist(), strict=True))


def test_evaluation_input_is_bgr_less_the_mean():
    image = np.zeros((30, 40, 3), np.uint8)
    image[..., 0] = 255
    found = prepare_image(image, RECIPE)
    assert found.shape == (3, 64, 64)
    assert_close(found[:, 7, 9], torch.tensor([-104.0, -117, 255 - 123]))
