"""What the demos read and write: which files, in which batches, and what is said of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.coco.demo_images import (
    DemoOutput,
    category_ids_of,
    find_images,
    image_ids,
    read_images,
    visible,
)
from common.coco.detections import Detections
from common.coco.images import read_image
from common.coco.index import COCO_CLASSES
from common.errors import UserError

PHOTOS = sorted(Path(__file__).parents[1].glob("data/tiny_coco/val2017/*.jpg"))[:3]
NAMES = ("cat", "dog", "émeu")


def test_the_same_name_in_two_folders_is_two_pictures(tmp_path):
    for name in ("a/1.jpg", "a/2.PNG", "b/c/1.jpg", "b/notes.txt", "a/out/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    a, b, out = (tmp_path / name for name in ("a", "b", "a/out"))
    assert list(find_images([a], out)) == ["1.jpg", "2.PNG"]
    assert list(find_images([a / "2.PNG", b, a / "1.jpg", b], out)) == [
        "a/2.PNG",
        "b/c/1.jpg",
        "a/1.jpg",
    ]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nowhere", "does not exist"),
        ("empty", "none of its 0 files has the suffix of an image format"),
        ("texts", "none of its 1 files has the suffix of an image format"),
        ("out/1.jpg", "lies in --show_dir"),
    ],
)
def test_an_input_without_images_is_an_error(tmp_path, given, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("texts/notes.txt", "out/1.jpg"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=reason):
        find_images([PHOTOS[0], tmp_path / given], tmp_path / "out")


def test_batches_are_filled_and_broken_files_left_out(tmp_path, capsys):
    for photo in PHOTOS:
        shutil.copy(photo, tmp_path)
    broken = tmp_path / "000000000001.jpg"
    broken.write_bytes(PHOTOS[0].read_bytes()[:2000])
    files = find_images([tmp_path], tmp_path / "out")
    batches = list(read_images(files, batch_size=2))
    names = [photo.name for photo in PHOTOS]
    assert [batch_names for batch_names, _ in batches] == [names[:2], names[2:]]
    for _, images in batches:
        for image in images:
            assert image.dtype == np.uint8
    np.testing.assert_array_equal(batches[1][1][0], read_image(PHOTOS[2]))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"skipped: {broken}: cannot read the image (")
    assert "re-download" not in err


def test_every_format_that_pillow_reads_is_taken_and_the_rest_counted(tmp_path, capsys):
    image = Image.open(PHOTOS[0]).resize((40, 30))
    for name in ("a.gif", "b.ppm", "c.tga", "d.JPEG"):
        image.save(tmp_path / name)
    for name in ("notes.txt", "labels.json"):
        (tmp_path / name).touch()
    files = find_images([tmp_path], tmp_path / "out")
    assert list(files) == ["a.gif", "b.ppm", "c.tga", "d.JPEG"]
    assert capsys.readouterr().err == f"{tmp_path}: 2 files are no images\n"


def test_a_file_that_is_named_is_tried_whatever_its_name(tmp_path, capsys):
    for name in ("photo", "x.JPG_large"):
        shutil.copy(PHOTOS[0], tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    inputs = [tmp_path / name for name in ("photo", "x.JPG_large", "notes.txt")]
    files = find_images(inputs, tmp_path / "out")
    ((names, images),) = read_images(files, batch_size=8)
    assert names == ["photo", "x.JPG_large"]
    np.testing.assert_array_equal(images[1], read_image(PHOTOS[0]))
    assert capsys.readouterr().err == (
        f"skipped: {tmp_path}/notes.txt: cannot read the image (not an image in a format that "
        "Pillow knows)\n"
    )
    output = DemoOutput(tmp_path / "out", NAMES, min_score=0.5)
    output.add("photo", images[0], NOTHING)
    assert Image.open(tmp_path / "out/photo.png").format == "PNG"


def test_full_batches_leave_no_empty_one(tmp_path):
    files = find_images(PHOTOS, tmp_path)
    assert [len(images) for _, images in read_images(files, 3)] == [3]
    assert [len(images) for _, images in read_images(files, 1)] == [1, 1, 1]
    assert list(read_images({}, 4)) == []


def test_images_are_upright(tmp_path):
    turned = Image.open(PHOTOS[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    ((_, (image,)),) = read_images({"turned.jpg": tmp_path / "turned.jpg"}, 8)
    assert image.shape == (turned.width, turned.height, 3)


BOXES = torch.tensor([[-5.0, 2.004, 30, 90], [1, 1, 9, 9], [3, 4, 70, 8]])
SCORES = torch.tensor([0.9, 0.5, 0.49999])
LABELS = torch.tensor([2, 0, 1])
FOUND = Detections(BOXES, SCORES, LABELS)
NOTHING = Detections(BOXES[:0], SCORES[:0], LABELS[:0])


def test_visible_boxes_are_good_enough_and_cut_at_the_border():
    boxes, scores, labels = visible(BOXES, SCORES, LABELS, (50, 60), 0.5)
    torch.testing.assert_close(boxes, torch.tensor([[0, 2.004, 30, 50], [1, 1, 9, 9]]))
    assert scores.tolist() == SCORES[:2].tolist()
    assert labels.tolist() == [2, 0]
    boxes, scores, labels = visible(BOXES, SCORES, LABELS, (50, 60), 1.0)
    assert (len(boxes), len(scores), len(labels)) == (0, 0, 0)


def test_each_class_may_have_a_lowest_score_of_its_own(tmp_path):
    output = DemoOutput(tmp_path, NAMES, min_score=[0.6, 0.3, 0.9])
    output.add("a.png", np.full((50, 60, 3), 128, np.uint8), FOUND)
    # The scores are 0.9 of class 2, 0.5 of class 0 and 0.49999 of class 1.
    assert output.results["a.png"]["classes"] == [NAMES[2], NAMES[1]]


def test_the_number_of_boxes_is_told_and_why_there_are_none(tmp_path):
    image = np.full((50, 60, 3), 128, np.uint8)
    output = DemoOutput(tmp_path, NAMES, min_score=0.5)
    output.add("a.png", image, NOTHING)
    assert output.boxes_line() == "boxes: none is detected"
    output.add("b.png", image, FOUND)
    output.add("c.png", image, FOUND)
    assert output.boxes_line() == "boxes: 4"
    strict = DemoOutput(tmp_path, NAMES, min_score=0.95)
    strict.add("a.png", image, FOUND)
    assert strict.boxes_line() == "boxes: none, the highest score is 0.900; lower --min_score"


def test_pictures_and_results(tmp_path):
    image = np.full((50, 60, 3), 128, np.uint8)
    output = DemoOutput(tmp_path / "out", NAMES, min_score=0.5)
    output.add("b/1.png", image, FOUND)
    output.add("2.jpg", image, NOTHING)
    assert len(output) == 2
    output.write()
    text = (tmp_path / "out/results.json").read_text(encoding="utf-8")
    assert "émeu" in text
    assert list(json.loads(text).items()) == [
        (
            "b/1.png",
            {
                "boxes": [[0, 2, 30, 50], [1, 1, 9, 9]],
                "scores": [0.9, 0.5],
                "classes": ["émeu", "cat"],
            },
        ),
        ("2.jpg", {"boxes": [], "scores": [], "classes": []}),
    ]
    drawn = np.asarray(Image.open(tmp_path / "out/b/1.png"))
    assert (drawn != image).any()
    empty = np.asarray(Image.open(tmp_path / "out/2.jpg"), int)
    assert abs(empty - image).max() < 3


def test_no_picture_no_file(tmp_path):
    output = DemoOutput(tmp_path / "out", NAMES, min_score=0.5)
    output.write()
    assert len(output) == 0
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "out").touch()
    output = DemoOutput(tmp_path / "out", NAMES, min_score=0.5)
    with pytest.raises(UserError, match=r"out/1\.jpg cannot be written"):
        output.add("1.jpg", np.zeros((9, 9, 3), np.uint8), FOUND)


def test_results_have_a_line_for_each_image(tmp_path):
    image = np.full((50, 60, 3), 128, np.uint8)
    output = DemoOutput(tmp_path, NAMES, min_score=0.5)
    for name in ("1.jpg", "2.jpg"):
        output.add(name, image, FOUND)
    output.write()
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert [line[:9] for line in lines] == ["{", '"1.jpg": ', '"2.jpg": ', "}"]


def test_cocos_results_hold_all_detections(tmp_path):
    image = np.full((50, 60, 3), 128, np.uint8)
    output = DemoOutput(tmp_path, NAMES, min_score=0.5)
    output.add("000000006818.jpg", image, FOUND)
    output.add("7.jpg", image, NOTHING)
    output.write(category_ids=(10, 20, 30))
    results = json.loads((tmp_path / "results.bbox.json").read_text())
    assert [(one["image_id"], one["category_id"]) for one in results] == [
        (6818, 30),
        (6818, 10),
        (6818, 20),
    ]
    assert results[1] == {
        "image_id": 6818, "category_id": 10, "bbox": [1, 1, 8, 8], "score": 0.5,
    }  # fmt: skip


def test_images_without_a_number_are_numbered():
    assert image_ids(["000000006818.jpg", "a/7.png"]) == [6818, 7]
    assert image_ids(["000000006818.jpg", "cat.png"]) == [1, 2]
    assert image_ids(["a/7.png", "b/7.png"]) == [1, 2]


def test_category_ids_are_the_checkpoints_or_cocos():
    assert category_ids_of({"category_ids": [5, 3]}, ("cat", "dog")) == (5, 3)
    ids = category_ids_of({}, COCO_CLASSES)
    assert (len(ids), ids[0], ids[11], ids[-1]) == (80, 1, 13, 90)
    assert category_ids_of({}, ("cat", "dog")) == (1, 2)
