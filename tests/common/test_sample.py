"""The sample set: a legal COCO data set, repeatable, written whole or not at all."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from common.coco import sample
from common.npu.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "set"
    sample.write_sample(folder, train=45, val=20)
    return folder


def open_split(folder, split):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(folder / "annotations" / f"instances_{split}2017.json")


@pytest.mark.parametrize(("split", "count"), [("train", 45), ("val", 20)])
def test_every_record_describes_its_picture(folder, split, count):
    coco = open_split(folder, split)
    assert [category["id"] for category in coco.dataset["categories"]] == [1, 3, 4, 9]
    assert len(coco.imgs) == count == len(list((folder / f"{split}2017").iterdir()))
    for image_id, record in coco.imgs.items():
        with Image.open(folder / f"{split}2017" / record["file_name"]) as image:
            image.load()
            assert (image.mode, image.format) == ("RGB", "JPEG")
            assert image.size == (record["width"], record["height"])
            assert all(240 <= side <= 400 for side in image.size)
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) <= 8
        masks = [coco.annToMask(annotation) for annotation in annotations]
        assert np.sum(masks, 0).max(initial=0) <= 1  # a pixel shows one object
        for annotation, mask in zip(annotations, masks, strict=True):
            assert mask.shape == (record["height"], record["width"])
            assert annotation["area"] == mask.sum() > 0
            assert annotation["bbox"] == rle.toBbox(coco.annToRLE(annotation)).tolist()


def test_the_set_has_its_rare_cases(folder):
    for split in ("train", "val"):
        coco = open_split(folder, split)
        crowds = [annotation["iscrowd"] for annotation in coco.anns.values()]
        assert 0 < sum(crowds) < 0.1 * len(crowds)
        assert any(not coco.imgToAnns[image_id] for image_id in coco.imgs)
        assert {annotation["category_id"] for annotation in coco.anns.values()} == {1, 3, 4, 9}


def test_shapes_differ_from_what_they_lie_on(folder):
    """Else no detector could find them: mean colour of an object against a frame around it."""
    coco = open_split(folder, "train")
    for image_id, record in coco.imgs.items():
        with Image.open(folder / "train2017" / record["file_name"]) as image:
            pixels = np.asarray(image, np.float32)
        if len(coco.imgToAnns[image_id]) == 1:
            mask = coco.annToMask(coco.imgToAnns[image_id][0]).astype(bool)
            assert np.linalg.norm(pixels[mask].mean(0) - pixels[~mask].mean(0)) > 45


def test_train_and_val_share_nothing(folder):
    train, val = open_split(folder, "train"), open_split(folder, "val")
    assert not set(train.imgs) & set(val.imgs)
    bytes_of = {
        split: {path.read_bytes() for path in (folder / f"{split}2017").iterdir()}
        for split in ("train", "val")
    }
    assert len(bytes_of["train"]) == 45
    assert not bytes_of["train"] & bytes_of["val"]


def test_smaller_set_of_the_same_seed_is_a_part_of_the_larger(folder, tmp_path):
    sample.write_sample(tmp_path / "again", train=11, val=2)
    sample.write_sample(tmp_path / "other", train=1, val=1, seed=1)
    paths = sorted((tmp_path / "again").rglob("*.jpg"))
    assert len(paths) == 13
    for path in paths:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path / "again")).read_bytes()
    again, whole = (open_split(root, "train") for root in (tmp_path / "again", folder))
    known = again.dataset["annotations"]
    assert known == whole.dataset["annotations"][: len(known)]
    first = "train2017/000000000001.jpg"
    assert (tmp_path / "other" / first).read_bytes() != (folder / first).read_bytes()


def test_full_folder_is_refused_and_an_empty_one_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    sample.write_sample(tmp_path / "empty", train=1, val=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="mine exists and is not empty"):
        sample.write_sample(tmp_path / "mine", train=1, val=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    draw = sample._draw_image
    calls = []

    def interrupted(*args, **flags):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args, **flags)

    monkeypatch.setattr(sample, "_draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.write_sample(tmp_path / "set", train=5, val=1)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    sample.main([str(tmp_path / "set"), "--train", "2", "--val", "1", "--seed", "5"])
    content = json.loads((tmp_path / "set/annotations/instances_train2017.json").read_text())
    assert len(content["images"]) == 2
    with pytest.raises(SystemExit, match=r"^error: .*set exists and is not empty"):
        sample.main([str(tmp_path / "set")])
    with pytest.raises(SystemExit, match=r"^error: "):
        sample.main([str(tmp_path / "none"), "--val", "0"])
    assert not (tmp_path / "none").exists()


@settings(max_examples=50, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7))).filter(np.any))
def test_annotation_of_any_mask(mask):
    record = sample._annotation(mask, "star", True)
    segmentation = rle.frPyObjects(record["segmentation"], *mask.shape)
    np.testing.assert_array_equal(rle.decode(segmentation), mask)
    assert record["bbox"] == rle.toBbox(segmentation).tolist()
    assert (record["area"], record["iscrowd"], record["category_id"]) == (mask.sum(), 1, 9)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(sample.CATEGORIES)), st.integers(0, 1000))
def test_size_says_nothing_about_the_class(kind, seed):
    points = sample._shape(np.random.default_rng(seed), kind)
    assert np.ptp(points, axis=0).max() == pytest.approx(1)
    np.testing.assert_allclose(points.max(0), -points.min(0), atol=1e-12)
    side = 60
    coverage = sample._rasterize([points * side + 40], 80, 80)
    assert coverage.sum() == pytest.approx(sample._polygon_area(points * side), rel=0.03)
