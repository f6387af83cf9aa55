from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from common.coco.images import read_image
from common.errors import UserError
from common.npu.distributed import Ranks
from fcos.augment import augment
from fcos.config import RECIPES
from fcos.data import (
    TrainingOrder,
    TrainingSet,
    build_loader,
    canvas_size,
    epoch_order,
    evaluation_batches,
    evaluation_recipe,
    iterations_per_epoch,
    normalise,
    orientation_groups,
    prepare_image,
    resize,
    resized_size,
    training_records,
)

RECIPE = replace(RECIPES["gn"], img_scale=("64,107",))
ONE, TWO = ((800, 1333),), ((640, 1333), (800, 1333))
SETS = {
    "groups": st.lists(st.integers(0, 1), min_size=1, max_size=60).map(np.array),
    "batch_size": st.integers(1, 5),
    "world_size": st.integers(1, 4),
}


@pytest.mark.parametrize(
    ("original", "expected"),
    [((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((640, 427), (1199, 800)),
     ((500, 500), (800, 800)), ((100, 640), (208, 1333)), ((1600, 3200), (667, 1333))],
)  # fmt: skip
def test_resized_size(original, expected):
    assert resized_size(*original, (800, 1333)) == expected


@pytest.mark.parametrize(
    ("sizes", "shapes", "scales", "expected"),
    [
        ([(800, 1067), (750, 1333)], "exact", ONE, (800, 1344)),
        ([(800, 1067), (750, 1100)], "exact", ONE, (800, 1120)),
        ([(800, 1067), (750, 1333)], "two", ONE, (800, 1344)),
        ([(208, 1333)], "two", ONE, (800, 1344)),
        ([(1067, 800), (800, 800)], "two", ONE, (1344, 800)),
        ([(800, 800)], "two", ONE, (1344, 800)),
        ([(800, 801), (800, 800)], "two", ONE, (800, 1344)),
        ([(800, 1067)], "square", ONE, (1344, 1344)),
        ([(640, 853), (640, 960)], "two", TWO, (640, 1344)),
        ([(640, 853), (800, 1067)], "two", TWO, (800, 1344)),
        ([(853, 640)], "two", TWO, (1344, 640)),
    ],
)
def test_canvases(sizes, shapes, scales, expected):
    assert canvas_size(sizes, shapes, scales) == expected


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(32, 3000), st.integers(32, 3000)), min_size=1, max_size=4),
    shapes=st.sampled_from(["exact", "two", "square"]),
    scales=st.sampled_from([ONE, TWO, ((64, 100),)]),
)
def test_every_batch_of_one_orientation_fits_a_canvas_of_the_set(sizes, shapes, scales):
    lying = sizes[0][1] > sizes[0][0]
    sizes = [(h, w) if (w > h) is lying else (w, h) for h, w in sizes if h != w] or sizes[:1]
    resized = [resized_size(h, w, scales[k % len(scales)]) for k, (h, w) in enumerate(sizes)]
    height, width = canvas_size(resized, shapes, scales)
    assert height >= max(h for h, _ in resized)
    assert width >= max(w for _, w in resized)
    assert height % 32 == width % 32 == 0
    if shapes == "two":
        full = [tuple(-(-side // 32) * 32 for side in scale) for scale in scales]
        assert (height, width) in [*full, *(shape[::-1] for shape in full)]


@settings(max_examples=60, deadline=None)
@given(**SETS, epoch=st.integers(0, 9))
def test_an_epoch_follows_the_original_group_sampler(groups, batch_size, world_size, epoch):
    """Its rule in plain Python, with the same generator."""
    generator = torch.Generator().manual_seed(7 + epoch)
    step, expected = batch_size * world_size, []
    for group in (0, 1):
        members = [i for i, g in enumerate(groups) if g == group]
        if members:
            mixed = [members[k] for k in torch.randperm(len(members), generator=generator).tolist()]
            missing = -len(mixed) % step
            expected += mixed + [mixed[k % len(mixed)] for k in range(missing)]
    batches = [expected[k : k + batch_size] for k in range(0, len(expected), batch_size)]
    order = torch.randperm(len(batches), generator=generator).tolist()
    expected = [record for k in order for record in batches[k]]

    members = orientation_groups(Records(groups))
    found = epoch_order(members, batch_size, world_size, 7, epoch).tolist()
    assert found == expected
    assert set(found) == set(range(len(groups)))
    for first in range(0, len(found), batch_size):
        assert len(set(groups[found[first : first + batch_size]])) == 1


class Records:
    """An index of images without annotations, as far as the order needs it."""

    def __init__(self, groups):
        self.sizes = np.where(groups[:, None] == 1, [[480, 640]], [[640, 480]])

    def __len__(self):
        return len(self.sizes)


@settings(max_examples=40, deadline=None)
@given(**SETS, start=st.integers(0, 30))
def test_ranks_share_an_epoch_and_a_resumed_order_is_the_rest(
    groups, batch_size, world_size, start
):
    records = Records(groups)
    recipe = replace(RECIPE, batch_size=batch_size)
    per_epoch = iterations_per_epoch(records, recipe, world_size)
    first, runs = min(start, 2 * per_epoch), []
    for rank in range(world_size):
        ranks = Ranks(rank=rank, world_size=world_size)
        whole = list(TrainingOrder(records, recipe, ranks, 5, 0, 2 * per_epoch))
        assert {len(batch) for batch in whole} == {batch_size}
        rest = list(TrainingOrder(records, recipe, ranks, 5, first, 2 * per_epoch))
        assert rest == whole[first:]
        runs.append(whole)
    for epoch in (0, 1):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        keys = [key for run in runs for batch in run[part] for key in batch]
        order = epoch_order(orientation_groups(records), batch_size, world_size, 5, epoch).tolist()
        assert keys == [(epoch, position, record) for position, record in enumerate(order)]


def test_nothing_to_train_on(tiny_train):
    empty = tiny_train.subset(np.array([], dtype=int))
    with pytest.raises(UserError, match=r"no image .* an annotation and sides of 32 pixels; check"):
        build_loader(RECIPE, empty, True, end=1)


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_do_not_depend_on_workers_or_where_a_run_starts(tiny_train):
    records = training_records(tiny_train)
    recipe = replace(RECIPE, img_scale=("48,80", "64,107"))
    whole = list(build_loader(recipe, records, True, seed=3, end=4))
    assert len(whole) == 4
    for workers in (1, 2):
        part = build_loader(recipe, records, True, seed=3, start=1, end=4, workers=workers)
        for batch, expected in zip(list(part), whole[1:], strict=True):
            assert_same(batch, expected)


@pytest.mark.parametrize("shapes", ["two", "exact", "square"])
def test_a_batch_has_fixed_types_and_one_orientation(tiny_train, shapes):
    records = training_records(tiny_train)
    recipe = replace(RECIPE, shapes=shapes)
    max_boxes = records.max_boxes()
    seen = set()
    for batch in build_loader(recipe, records, True, end=iterations_per_epoch(records, recipe, 1)):
        height, width = batch.images.shape[1:3]
        seen.add((height, width))
        assert {k: (tuple(v.shape), v.dtype) for k, v in batch._asdict().items()} == {
            "images": ((2, height, width, 3), torch.uint8),
            "resized_sizes": ((2, 2), torch.int64),
            "boxes": ((2, max_boxes, 4), torch.float32),
            "labels": ((2, max_boxes), torch.int64),
            "valid": ((2, max_boxes), torch.bool),
            "image_ids": ((2,), torch.int64),
        }
        lying = batch.resized_sizes[:, 1] > batch.resized_sizes[:, 0]
        assert lying.all() or not lying.any()
        for image, (h, w) in zip(batch.images, batch.resized_sizes.tolist(), strict=True):
            assert h <= height
            assert w <= width
            assert not image[h:].any()
            assert not image[:, w:].any()
    assert max_boxes % 16 == 0
    expected = {"two": {(64, 128), (128, 64)}, "square": {(128, 128)}}
    assert seen == expected[shapes] if shapes in expected else len(seen) > 2


def test_several_scales_are_drawn_evenly_and_have_canvases_of_their_own(tiny_train):
    records = training_records(tiny_train)
    recipe = replace(RECIPE, img_scale=("32,107", "64,107"), batch_size=1)
    loader = build_loader(recipe, records, True, end=3 * iterations_per_epoch(records, recipe, 1))
    batches = list(loader)
    canvases = {tuple(batch.images.shape[1:3]) for batch in batches}
    assert canvases == {(32, 128), (64, 128), (128, 32), (128, 64)}
    small = np.mean([batch.resized_sizes.min().item() <= 32 for batch in batches])
    assert 0.35 < small < 0.65


def test_flips_are_drawn_evenly_and_move_image_and_boxes(tiny_train):
    records = training_records(tiny_train)
    always, never = (
        TrainingSet(records, replace(RECIPE, flip_probability=p), 0) for p in (1.0, 0.0)
    )
    for record in (0, 1):
        flipped = always[0, 0, record]
        plain = never[0, 0, record]
        assert flipped.image.shape == plain.image.shape
        assert (flipped.image.flip(1).int() - plain.image.int()).abs().max() <= 1
        width = plain.image.shape[1]
        boxes = flipped.boxes
        np.testing.assert_allclose(width - boxes[:, [2, 0]], plain.boxes[:, [0, 2]], atol=1e-4)
        np.testing.assert_array_equal(boxes[:, [1, 3]], plain.boxes[:, [1, 3]])
        assert flipped.labels.tolist() == plain.labels.tolist()
    dataset = TrainingSet(records, RECIPE, 0)
    plain = never[0, 0, 0].image
    flips = [not torch.equal(dataset[0, position, 0].image, plain) for position in range(60)]
    assert 0.3 < np.mean(flips) < 0.7


def test_without_augmentation_every_epoch_is_the_same_at_the_largest_scale(tiny_train):
    recipe = replace(RECIPE, augment=False, img_scale=("32,54", "64,107"))
    dataset = TrainingSet(tiny_train, recipe, 0)
    one, other = dataset[0, 0, 1], dataset[3, 17, 1]
    assert torch.equal(one.image, other.image)
    original = read_image(tiny_train.path(1))
    assert torch.equal(one.image, resize(original, one.image.shape[:2], flip=False))
    assert max(one.image.shape[:2]) == 107 or min(one.image.shape[:2]) == 64


def edited(index, record, **columns):
    """The index with other values in the rows of one image."""
    table = index.table.copy()
    rows = slice(int(index.offsets[record]), int(index.offsets[record + 1]))
    for name, values in columns.items():
        table[name][rows.start : rows.start + len(values)] = values
    return replace(index, table=table)


def test_ground_truth_leaves_out_what_the_original_does(tiny_train):
    record = int(np.diff(tiny_train.offsets).argmax())
    count = len(tiny_train.annotations(record))
    plain = TrainingSet(tiny_train, RECIPE, 0).ground_truth(record)
    crowds = int(tiny_train.annotations(record).crowd.sum())
    assert len(plain[0]) == count - crowds
    height, width = tiny_train.sizes[record]
    changed = edited(
        tiny_train,
        record,
        crowd=[1, 0, 0, 0, 0, 0],
        ignore=[0, 1, 0, 0, 0, 0],
        box_xywh=[
            [1, 1, 9, 9], [1, 1, 9, 9], [1, 1, 9, 0.5], [5, 5, 0.9, 9],
            [-4, 5, 9, 9], [width - 3, height - 3, 10, 10],
        ],
    )  # fmt: skip
    boxes, _ = TrainingSet(changed, RECIPE, 0).ground_truth(record)
    assert_close(boxes[0], np.float32([-4, 5, 5, 14]))
    assert_close(boxes[1], np.float32([width - 3, height - 3, width + 7, height + 7]))
    sample = TrainingSet(changed, replace(RECIPE, augment=False), 0)[0, 0, record]
    assert sample.boxes[0, 0] == 0
    assert sample.boxes[1, 2:].tolist() == [sample.image.shape[1], sample.image.shape[0]]
    assert len(sample.labels) == len(boxes)


def test_training_records_have_annotations_and_are_not_tiny(tiny_train):
    assert len(training_records(tiny_train)) == (np.diff(tiny_train.offsets) > 0).sum()
    sizes = tiny_train.sizes.copy()
    sizes[0] = (31, 500)
    found = training_records(replace(tiny_train, sizes=sizes))
    assert tiny_train.image_ids[0] not in found.image_ids


def test_an_image_of_only_crowds_stays_without_boxes(tiny_train):
    crowded = edited(tiny_train, 0, crowd=[1] * len(tiny_train.annotations(0)))
    assert crowded.image_ids[0] in training_records(crowded).image_ids
    assert len(TrainingSet(crowded, RECIPE, 0)[0, 0, 0].boxes) == 0


def test_an_image_of_another_size_than_annotated_is_named(tiny_train):
    sizes = tiny_train.sizes.copy()
    sizes[0] = sizes[0][::-1] + 1
    with pytest.raises(UserError, match=r"\.jpg: is \d+ x \d+ pixels, \d+ x \d+ in the annotation"):
        TrainingSet(replace(tiny_train, sizes=sizes), RECIPE, 0)[0, 0, 0]


def test_collate_lays_images_on_canvases_with_zeros_around(tiny_train):
    records = training_records(tiny_train)
    dataset = TrainingSet(records, RECIPE, seed=0)
    landscape = orientation_groups(records)[1][:3].tolist()
    samples = [dataset[0, position, record] for position, record in enumerate(landscape)]
    batch = dataset.collate(samples)
    for i, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        assert batch.resized_sizes[i].tolist() == [height, width]
        expected = torch.zeros_like(batch.images[i])
        expected[:height, :width] = sample.image
        assert torch.equal(batch.images[i], expected)


def test_resize_is_exact_on_planes():
    """A linear picture stays linear inside, whichever way it is flipped."""
    ramp = np.broadcast_to(np.arange(0, 200, 4, dtype=np.uint8)[None, :, None], (20, 50, 3)).copy()
    found = resize(ramp, (40, 100))
    assert found.shape == (40, 100, 3)
    assert (found[:, 1:-1].int().diff(dim=1) == 2).all()
    assert torch.equal(resize(ramp, (40, 100), flip=True), found.flip(1))


def test_normalised_input_is_bgr_minus_mean_and_zero_outside(recipe):
    images = torch.zeros(2, 8, 10, 3, dtype=torch.uint8)
    images[..., 0], images[..., 2] = 200, 7
    sizes = torch.tensor([[8, 10], [3, 4]])
    found = normalise(images, sizes, recipe)
    mean = torch.tensor(recipe.mean)
    inside = torch.tensor([7.0, 0.0, 200.0]) - mean
    assert_close(found[0], inside.view(3, 1, 1).expand(3, 8, 10))
    assert_close(found[1, :, :3, :4], inside.view(3, 1, 1).expand(3, 3, 4))
    assert not found[1, :, 3:].any()
    assert not found[1, :, :, 4:].any()


def test_augment_gives_the_input_and_boxes(tiny_train):
    (batch,) = build_loader(RECIPE, training_records(tiny_train), True, end=1)
    images, boxes = augment(batch, RECIPE)
    assert_close(images, normalise(batch.images, batch.resized_sizes, RECIPE))
    assert torch.equal(boxes, batch.boxes)


def test_evaluation_reads_every_image_once_and_batches_equal_shapes(tiny_val):
    few = tiny_val.subset(np.arange(12))
    for shapes in ("exact", "two", "square"):
        recipe = replace(RECIPE, eval_shapes=shapes, eval_batch_size=3)
        for world_size in (1, 3):
            seen = {}
            for rank in range(world_size):
                ranks = Ranks(rank=rank, world_size=world_size)
                for images, sizes, original, ids in build_loader(recipe, few, False, ranks=ranks):
                    for k, image_id in enumerate(ids.tolist()):
                        assert image_id not in seen
                        seen[image_id] = original[k].tolist()
                        # The input of an image is the one that it has alone.
                        record = int(np.flatnonzero(few.image_ids == image_id)[0])
                        alone = prepare_image(read_image(few.path(record)), recipe)
                        assert_close(normalise(images, sizes, recipe)[k], alone)
            assert seen == dict(zip(few.image_ids.tolist(), few.sizes.tolist(), strict=True))


def test_evaluation_shapes_depend_on_the_device_and_not_on_who_asks(tiny_val):
    assert RECIPE.eval_shapes == "auto"
    image = read_image(tiny_val.path(0))
    with pytest.raises(ValueError, match="take the recipe from evaluation_recipe"):
        prepare_image(image, RECIPE)
    with pytest.raises(ValueError, match="take the recipe from evaluation_recipe"):
        build_loader(RECIPE, tiny_val, False)
    npu = evaluation_recipe(RECIPE, SimpleNamespace(type="npu"))
    assert sorted(prepare_image(image, npu).shape) == [3, 64, 128]


def test_evaluation_shapes_by_device(tiny_val):
    cpu, npu = (evaluation_recipe(RECIPE, SimpleNamespace(type=kind)) for kind in ("cpu", "npu"))
    assert (cpu.eval_shapes, npu.eval_shapes) == ("exact", "two")
    asked = replace(RECIPE, eval_shapes="square")
    assert evaluation_recipe(asked, SimpleNamespace(type="npu")) == asked
    full = replace(npu, eval_batch_size=100)
    assert len(evaluation_batches(tiny_val, full)) == 2
    assert sorted(chain(*evaluation_batches(tiny_val, full))) == list(range(len(tiny_val)))
    groups = [group.tolist() for group in orientation_groups(tiny_val)]
    assert sorted(evaluation_batches(tiny_val, full)) == sorted(groups)
