"""Index, order, transforms: golden values, exact resume, every record once an epoch."""

import dataclasses
import io
import re

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from common.arithmetic import ceil_div
from common.coco.images import decode_image
from common.errors import UserError
from common.npu.distributed import Ranks
from ssd_resnet34.tfrecord.augment import augment, jitter_colours
from ssd_resnet34.tfrecord.config import COCO_CATEGORY_IDS
from ssd_resnet34.tfrecord.data import (
    Batch,
    TrainingOrder,
    TrainingSet,
    build_loader,
    crop_boxes,
    crop_image,
    crop_window,
    prepare_image,
    resize_crop,
    sample,
    trained_records_line,
    training_records,
)
from ssd_resnet34.tfrecord.example import encode
from ssd_resnet34.tfrecord.index import read_index
from ssd_resnet34.tfrecord.records import RecordWriter
from tests.golden.fill import probe
from tests.ssd_resnet34_tfrecord.checks import check
from tests.ssd_resnet34_tfrecord.test_example import GOOD
from tests.ssd_resnet34_tfrecord.test_golden import YXYX, check_probe

FLAG = "--training_file_pattern"


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    return file.getvalue()


PNG = png()


def exact_crop(image, window, size=300):
    """The seed's crop (size, size, 3) float32 in 0..255, of a window with edges anywhere."""
    left, top, right, bottom = torch.from_numpy(window)
    height, width = (side - 1 for side in image.shape[:2])
    steps = torch.arange(size, dtype=torch.float32)
    rows = top * height + steps * ((bottom - top) * height / (size - 1))
    columns = left * width + steps * ((right - left) * width / (size - 1))
    return sample(image, rows, columns)


@pytest.fixture(scope="module")
def index(golden_dir):
    return read_index(str(golden_dir / "train2017*"), FLAG)


@pytest.fixture(scope="module")
def by_id(index):
    """The golden records by image id."""
    found = [index.read(i) for i in range(len(index))]
    return {record.image_id: record for record in found}


def test_index_of_the_golden_shards(golden, index):
    expected = [
        record
        for name in sorted(golden("expected")["files"])
        if name.startswith("train")
        for record in golden("expected")["files"][name]
    ]
    counts = [len(record["decoded"]["classes"]) for record in expected]
    assert index.num_boxes.tolist() == counts
    assert index.spans[:, 1].tolist() == [record["record_bytes"] for record in expected]
    assert len(training_records(index)) == sum(count > 0 for count in counts) == 5
    assert index.max_boxes() == 32


def test_the_index_opens_each_file_once(golden_dir, monkeypatch):
    opened = []

    def counting_open(path, *arguments):
        opened.append(path)
        return open(path, *arguments)

    monkeypatch.setattr("ssd_resnet34.tfrecord.records.open", counting_open, raising=False)
    index = read_index(str(golden_dir / "train2017*"), FLAG)
    assert len(index) == 6
    assert opened == index.files.tolist()


def test_an_unknown_field_and_a_broken_length(tmp_path):
    path = tmp_path / "file"
    with RecordWriter(path) as writer:
        writer.write(encode(GOOD))
        writer.write(encode(GOOD) + b"\x7a\x00")  # an unknown field
        writer.write(b"\x0a" + b"\xff" * 30)
    with pytest.raises(UserError, match=r"record at byte \d+: not a tf.Example"):
        read_index(str(path), FLAG)
    with RecordWriter(path) as writer:
        writer.write(encode(GOOD))
        writer.write(encode(GOOD) + b"\x7a\x00")
    assert read_index(str(path), FLAG).num_boxes.tolist() == [1, 1]


def test_only_empty_files_and_a_damaged_one(golden_dir):
    with pytest.raises(UserError, match="all 1 files are empty"):
        read_index(str(golden_dir / "empty*"), FLAG)
    damaged = golden_dir / "corrupt/truncated.tfrecord"
    with pytest.raises(UserError, match=re.escape(f"{damaged}: record at byte 63151")):
        read_index(str(damaged), FLAG)
    flipped = read_index(str(golden_dir / "corrupt/payload_flip.tfrecord"), FLAG)
    with pytest.raises(UserError, match="record at byte 63151: wrong checksum of the content"):
        flipped.read(1)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("length", [5, 12, 100])
def test_every_record_once_an_epoch_on_any_number_of_ranks(length, world_size, recipe):
    epochs, batch_size = 4, 4
    recipe = dataclasses.replace(recipe, batch_size=batch_size)
    records = range(length)
    end = ceil_div(epochs * length, batch_size * world_size)
    orders = [
        list(TrainingOrder(records, recipe, Ranks(r, r, world_size, world_size), 7, 0, end))
        for r in range(world_size)
    ]
    seen = [key for order in orders for batch in order for key in batch]
    for epoch in range(epochs):
        of_epoch = [record for e, _, record in seen if e == epoch]
        assert sorted(of_epoch) == list(records)
    assert len({tuple(r for e, _, r in sorted(seen) if e == k) for k in range(epochs)}) == epochs
    resumed = list(TrainingOrder(records, recipe, Ranks(0, 0, world_size), 7, 1, end))
    assert resumed == orders[0][1:]


def test_batches_do_not_depend_on_workers_and_resume_exactly(index, recipe):
    recipe = dataclasses.replace(recipe, batch_size=2)
    records = training_records(index)
    one = list(build_loader(recipe, records, True, seed=3, end=4))
    other = list(build_loader(recipe, records, True, seed=3, start=2, end=4, workers=2))
    assert len(one) == 4
    assert one[0].images.shape == (2, 300, 300, 3)
    for batch, again in zip(one[2:], other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not torch.equal(one[0].images, one[2].images)


def test_evaluation_images_are_shared_out_once(index, recipe):
    loaders = [build_loader(recipe, index, False, ranks=Ranks(r, r, 4, 4)) for r in range(4)]
    ids = [image_id for loader in loaders for _, _, batch in loader for image_id in batch.tolist()]
    expected = [index.read(i).image_id for i in range(len(index))]
    assert sorted(ids) == sorted(expected)


def test_edge_records_load(golden_dir, recipe):
    edge = read_index(str(golden_dir / "edge*"), FLAG)
    assert edge.num_boxes.tolist()[2:4] == [0, 0]
    dataset = TrainingSet(training_records(edge), recipe, seed=0)
    assert all(dataset[0, k, k].valid.any() for k in range(len(dataset)))


def test_an_unknown_category_and_a_broken_image_are_named(tmp_path, recipe):
    for name, change, complaint in (
        ("category", {"image/object/class/label": (int, [12])}, "category 12 is none"),
        ("image", {"image/encoded": (bytes, [b"\xff\xd8broken"])}, r"image \(not an image"),
    ):
        with RecordWriter(tmp_path / name) as writer:
            picture = {"image/encoded": (bytes, [PNG])}
            writer.write(encode(GOOD | picture | change))
        dataset = TrainingSet(read_index(str(tmp_path / name), FLAG), recipe, seed=0)
        with pytest.raises(UserError, match=rf"{name}: record at byte 0: .*{complaint}"):
            dataset[0, 0, 0]


def size_features(height, width):
    return {"image/height": (int, [height]), "image/width": (int, [width])}


def record_of_size(path, size):
    """The index of a file of one record, whose image is 4 x 4 pixels."""
    with RecordWriter(path) as writer:
        writer.write(encode(GOOD | {"image/encoded": (bytes, [PNG])} | size))
    return read_index(str(path), FLAG)


@pytest.mark.parametrize("size", [{}, size_features(4, 4), {"image/width": (int, [9])}])
def test_a_record_is_taken_where_it_says_no_other_size(tmp_path, recipe, size):
    records = record_of_size(tmp_path / "records", size)
    assert TrainingSet(records, recipe, seed=0)[0, 0, 0].valid.any()


def test_a_record_that_says_another_size_is_named(tmp_path, recipe, capsys):
    records = record_of_size(tmp_path / "records", size_features(height=6, width=4))
    complaint = (
        r"records: record at byte 0: its image is 4 x 4 pixels, 4 x 6 in image/width and "
        "image/height; convert the data set again"
    )
    with pytest.raises(UserError, match=complaint):
        TrainingSet(records, recipe, seed=0)[0, 0, 0]
    with pytest.raises(UserError, match=complaint):
        next(iter(build_loader(recipe, records, training=False)))
    assert check(tmp_path, str(tmp_path / "records"), "", "", COCO_CATEGORY_IDS) == 1
    printed = capsys.readouterr()
    assert re.search(complaint, printed.err)
    assert "1 errors" in printed.out


def test_boxes_that_are_trained_on_are_counted(index):
    num_boxes = index.num_boxes.sum()
    assert trained_records_line(index) == (
        f"{num_boxes} of {num_boxes} boxes are trained on; left out: 1 of 6 records, without a box"
    )
    with_boxes = training_records(index)
    assert trained_records_line(with_boxes) == f"{num_boxes} of {num_boxes} boxes are trained on"
    with pytest.raises(UserError, match=r"0 of 0 boxes are trained on;.*nothing to train on"):
        trained_records_line(index.subset(index.num_boxes == 0))


@pytest.mark.parametrize(("name", "shape"), [("up", (123, 217, 3)), ("down", (427, 640, 3))])
def test_evaluation_input_of_random_images(golden, recipe, name, shape):
    draws = np.random.default_rng(4)
    images = {s: draws.integers(0, 256, s).astype(np.uint8) for s in ((123, 217, 3), (427, 640, 3))}
    found = prepare_image(images[shape], recipe).permute(1, 2, 0)
    expected = golden("preprocess")
    if len(expected[f"random_{name}_nhwc/shape"]) == 4:
        found = found.unsqueeze(0)
    check_probe(expected, f"random_{name}_nhwc", found, atol=5e-6)


@pytest.mark.parametrize("i", [0, 1])
def test_evaluation_input_of_real_images(golden, recipe, by_id, i):
    expected = golden("preprocess")
    encoded = by_id[int(expected[f"image_{i}_source_id"])].encoded
    image = decode_image(encoded, "file")
    assert_allclose(
        image.sum(axis=(0, 1), dtype=np.int64), expected[f"image_{i}_pillow_sum"], rtol=1e-6
    )
    found = prepare_image(image, recipe).permute(1, 2, 0)
    check_probe(expected, f"image_{i}_hwc_pillow_decoded", found, atol=5e-6)
    seeds = probe(found.numpy(), count=len(expected[f"image_{i}_hwc/index"]))
    difference = np.abs(seeds["value"] - expected[f"image_{i}_hwc/value"])
    assert difference.mean() < 0.04
    assert difference.max() < 0.3


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("k", [0, 1])
def test_training_crops_and_colours(golden, by_id, i, k):
    expected, name = golden("augment"), f"crop_{i}_{k}"
    record = by_id[int(expected[f"{name}/source_id"])]
    window = expected[f"{name}/bounds_ymin_xmin_ymax_xmax"][YXYX]
    image = decode_image(record.encoded, "file")
    crop = exact_crop(image, window) / 255
    check_probe(expected, f"{name}/image_hwc", crop, atol=1e-6)
    # Ours has its edges on centres of pixels, and whole grey levels.
    height, width = image.shape[:2]
    reach = np.array([width - 1, height - 1, width - 1, height - 1])
    ours, theirs = (
        resize_crop(crop_image(image, window), 300),
        exact_crop(image, (np.rint(window * reach) / reach).astype(np.float32)),
    )
    assert ours.dtype == torch.uint8
    difference = (ours.float() - theirs).abs()
    assert difference.max() < 1.5
    assert difference.mean() < 0.4
    boxes, inside = crop_boxes(record.boxes_xyxy, window)
    assert_allclose(boxes[:, YXYX], expected[f"{name}/boxes"], rtol=0, atol=1e-6)
    labels = [COCO_CATEGORY_IDS.index(category) + 1 for category in record.category_ids[inside]]
    assert_array_equal(labels, expected[f"{name}/classes"])
    jitter = torch.from_numpy(expected[f"{name}/jitter_brightness_contrast_saturation_hue"])
    coloured = jitter_colours(crop.permute(2, 0, 1).unsqueeze(1), jitter.unsqueeze(0))
    check_probe(expected, f"{name}/jittered_hwc", coloured[:, 0].permute(1, 2, 0), atol=3e-6)


def test_windows_keep_the_rules(by_id, recipe):
    boxes = by_id[403013].boxes_xyxy
    rng = np.random.default_rng(0)
    height, width = 361, 641
    draws = [crop_window(boxes, (height, width), recipe, rng) for _ in range(300)]
    windows = np.array([window for window in draws if window is not None])
    assert 0.3 < 1 - len(windows) / len(draws) < 0.8
    pixels = windows * (width - 1, height - 1, width - 1, height - 1)
    assert_allclose(pixels, pixels.round(), rtol=0, atol=1e-3)
    width, height = (windows[:, 2:] - windows[:, :2]).T
    assert (windows >= 0).all()
    assert (windows <= 1).all()
    assert (np.minimum(width, height) >= 0.3 - 3e-3).all()
    assert (np.maximum(width / height, height / width) < 2 + 3e-2).all()
    for window in windows:
        kept, inside = crop_boxes(boxes, window)
        assert inside.any()
        assert ((kept >= 0) & (kept <= 1)).all()
        low, high = np.maximum(boxes[:, :2], window[:2]), np.minimum(boxes[:, 2:], window[2:])
        assert (low < high).all()  # every box overlaps the window


def test_augment_flips_and_recolours(index, recipe):
    dataset = TrainingSet(training_records(index), recipe, seed=0)
    batch = Batch(*map(torch.stack, zip(*(dataset[0, k, k] for k in range(4)), strict=True)))
    still = batch._replace(
        flip=torch.tensor([True, False, True, False]),
        colour_jitter=torch.tensor([0.0, 1, 1, 0]).expand(4, 4),
    )
    plain, _ = augment(still, dataclasses.replace(recipe, augment=False))
    images, boxes = augment(still, recipe)
    assert_allclose(images[1::2], plain[1::2], rtol=0, atol=2e-5)
    assert_allclose(images[::2], plain[::2].flip(3), rtol=0, atol=2e-5)
    assert_array_equal(boxes[1], batch.boxes[1])
    left, top, right, bottom = batch.boxes[0].unbind(-1)
    assert_array_equal(boxes[0], torch.stack([1 - right, top, 1 - left, bottom], dim=-1))
    changed, _ = augment(batch, recipe)
    assert (changed - images).abs().mean() > 0.05
