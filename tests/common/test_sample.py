"""The sample set: a legal COCO data set, repeatable, written whole or not at all."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from common.coco import sample
from common.errors import UserError


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
    for position, (image_id, record) in enumerate(coco.imgs.items()):
        picture, objects = sample.draw_picture(split, position)
        with Image.open(folder / f"{split}2017" / record["file_name"]) as image:
            assert (image.mode, image.format) == ("RGB", "JPEG")
            assert image.size == picture.size == (record["width"], record["height"])
            assert all(240 <= side <= 400 for side in image.size)
            assert np.abs(np.asarray(image, int) - np.asarray(picture, int)).mean() < 10
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(objects) <= 8
        seen = np.sum([drawn.visible for drawn in objects], 0)
        assert seen.max(initial=0) <= 1  # a pixel, an object
        for annotation, drawn in zip(annotations, objects, strict=True):
            assert sample.CATEGORIES[drawn.category] == annotation["category_id"]
            assert annotation["area"] == drawn.visible.sum() > 0
            rows, columns = np.nonzero(drawn.visible)
            corner, end = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
            assert annotation["bbox"] == [*corner, *np.subtract(end, corner)]


def test_the_set_has_its_rare_cases(folder):
    for split in ("train", "val"):
        coco = open_split(folder, split)
        crowds = [annotation["iscrowd"] for annotation in coco.anns.values()]
        assert 0 < sum(crowds) < 0.1 * len(crowds)
        assert any(not coco.imgToAnns[image_id] for image_id in coco.imgs)
        assert {annotation["category_id"] for annotation in coco.anns.values()} == {1, 3, 4, 9}


def test_shapes_differ_from_what_they_lie_on():
    """Else no detector could find them: mean colour of an object against all around it."""
    pictures = (sample.draw_picture("train", position) for position in range(120))
    alone = [(picture, objects[0]) for picture, objects in pictures if len(objects) == 1]
    assert len(alone) > 10
    for picture, drawn in alone:
        pixels = np.asarray(picture, np.float32)
        seen = drawn.visible
        assert np.linalg.norm(pixels[seen].mean(0) - pixels[~seen].mean(0)) > 45


def test_half_of_every_object_stays_in_sight(monkeypatch):
    masks, draw = [], sample.draw_mask
    monkeypatch.setattr(sample, "draw_mask", lambda *args: masks.append(draw(*args)) or masks[-1])
    hidden = 0
    for position in range(60):
        masks.clear()
        _, objects = sample.draw_picture("val", position)
        for drawn in objects:
            seen = drawn.visible
            # The object's whole mask is the smallest that was tried and holds what is seen of it.
            tried = [np.asarray(mask) > 127 for mask in masks]
            whole = min(mask.sum() for mask in tried if not (seen & ~mask).any())
            assert seen.sum() > 0.5 * whole
            hidden += seen.sum() < whole
    assert hidden > 10  # occlusion is common


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
    draw = sample.draw_picture
    calls = []

    def interrupted(*args, **flags):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args, **flags)

    monkeypatch.setattr(sample, "draw_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.write_sample(tmp_path / "set", train=5, val=1)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    sample.main([str(tmp_path / "set"), "--train", "2", "--val", "1"])
    content = json.loads((tmp_path / "set/annotations/instances_train2017.json").read_text())
    assert len(content["images"]) == 2
    with pytest.raises(SystemExit, match=r"^error: .*set exists and is not empty"):
        sample.main([str(tmp_path / "set")])
    with pytest.raises(SystemExit, match=r"^error: "):
        sample.main([str(tmp_path / "none"), "--val", "0"])
    assert not (tmp_path / "none").exists()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(sample.CATEGORIES)), st.integers(0, 1000))
def test_size_and_place_say_nothing_about_the_class(kind, seed):
    points = sample.random_shape(np.random.default_rng(seed), kind)
    assert np.ptp(points, axis=0).max() == pytest.approx(1)
    np.testing.assert_allclose(points.max(0), -points.min(0), atol=1e-12)


@pytest.mark.parametrize("kind", list(sample.CATEGORIES))
def test_masks_are_the_shapes(monkeypatch, kind):
    shapes, shape, whole = [], sample.random_shape, 0
    monkeypatch.setattr(
        sample, "random_shape", lambda *args: shapes.append(shape(*args)) or shapes[-1]
    )
    for seed in range(30):
        mask = (
            np.asarray(sample.draw_mask(np.random.default_rng(seed), (400, 400), kind, False)) / 255
        )
        rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
        if min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == 399:
            continue  # cut off
        whole += 1
        x, y = shapes[-1].T
        area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
        side = max(len(np.trim_zeros(mask.sum(axis))) for axis in (0, 1)) - 1
        assert mask.sum() == pytest.approx(area * side**2, rel=0.06)
    assert whole > 5
