"""Where the annotation file and the images of a split are looked for."""

from pathlib import Path

import pytest

from common.coco.layout import find_coco
from common.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
TRAIN = TINY / "annotations" / "instances_train2017.json"


def make(folder, *names):
    """Make files, and folders where a name ends in a slash."""
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return str(folder)


def refusal(folder, split="val", **named):
    with pytest.raises(UserError) as raised:
        find_coco(str(folder), split, **named)
    return str(raised.value)


def test_coco(tmp_path):
    assert find_coco(str(TINY), "train")[:2] == (str(TRAIN), str(TINY / "train2017"))
    folder = make(tmp_path, "val2017/", "annotations/bbox_only_instances_val2017.json")
    slim = tmp_path / "annotations" / "bbox_only_instances_val2017.json"
    assert find_coco(folder, "val")[:2] == (str(slim), str(tmp_path / "val2017"))
    make(tmp_path, "annotations/instances_val2017.json")
    assert find_coco(folder, "val").annotation_file.endswith("/instances_val2017.json")


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["train/_annotations.coco.json", "valid/_annotations.coco.json"], "Roboflow"),
        (["train.json", "val.json", "train/", "val/"], "plain"),
        (["annotations/train.json", "annotations/val.json", "images/"], "plain"),
        (["annotations/instances_train.json", "images/train/", "val.json", "images/val/"], "plain"),
        (["train.json", "val.json", "train/images/", "valid/images/", "train/labels/"], "plain"),
    ],
)
def test_other_layouts_are_recognised_and_named(tmp_path, names, layout):
    folder = make(tmp_path, *names)
    for split in ("train", "val"):
        found = find_coco(folder, split)
        assert Path(found.annotation_file).is_file()
        assert Path(found.image_dir).is_dir()
        assert found.layout == layout


def test_files_that_are_named_are_taken_or_named_in_the_refusal(tmp_path):
    named = {"annotations": str(TRAIN), "images": str(TINY / "train2017")}
    assert find_coco("", "val", **named)[:2] == (str(TRAIN), str(TINY / "train2017"))
    message = refusal(TINY, annotations="typo.json")
    assert message == "--val_annotations typo.json: no such file; give COCO's JSON"
    message = refusal(TINY, images="typo")
    assert message == "--val_images typo: no such folder; give that of the images"
    assert "name it with --val_images" in refusal(tmp_path, annotations=str(TRAIN))
    assert "name it with --val_annotations" in refusal(tmp_path, images=str(TINY / "val2017"))


def test_what_is_absent_is_said_and_nothing_else(tmp_path):
    assert "no such folder; bash download_dataset.sh" in refusal(tmp_path / "nowhere")
    make(tmp_path, "val2017/")
    message = refusal(tmp_path)
    assert f"no file {tmp_path}/annotations/instances_val2017.json (layout: COCO" in message
    assert "no folder" not in message
    assert "download_dataset.sh" in message


def test_what_is_absent_of_another_layout_is_said(tmp_path):
    make(tmp_path, "train/_annotations.coco.json")
    message = refusal(tmp_path)
    assert f"no file {tmp_path}/valid/_annotations.coco.json and no folder" in message
    assert "(layout: Roboflow); name both" in message
    assert "download_dataset.sh" not in message
    make(tmp_path, "val.json")
    assert f"no folder {tmp_path}/val/images (layout: plain)" in refusal(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_converted_roboflow_export_is_found(tmp_path, split):
    """The command in the refusal leads to files that are found."""
    folder = make(tmp_path, "data.yaml", "train/labels/a.txt", "valid/labels/a.txt")
    make(tmp_path, "train/images/a.jpg", "valid/images/a.jpg")
    words = refusal(folder, split).split()
    labels = words[words.index("convert") + 1]
    annotations = words[words.index("convert") + 2]
    images = words[words.index("--img_folder") + 1]
    assert Path(labels).is_dir()
    Path(annotations).touch()
    assert find_coco(folder, split)[:2] == (annotations, images)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["Annotations/a.xml", "JPEGImages/"], "VOC's XML"),
        (["VOC2007/Annotations/a.xml", "VOC2007/JPEGImages/"], "VOC's XML"),
        (["train/a.xml", "train/a.jpg"], "VOC's XML"),
        (["obj_train_data/a.txt", "obj_train_data/a.jpg"], "YOLO's text files"),
        (["labels/train2017/a.txt", "images/train2017/"], "YOLO's text files"),
        (["labels/a.txt", "images/"], "YOLO's text files"),
        (["train/labels/a.txt", "train/images/", "data.yaml"], "YOLO's text files"),
        (["labels/train/a.txt", "images/train/"], "YOLO's text files"),
    ],
)
def test_other_formats_come_with_the_command_of_a_converter(tmp_path, names, words):
    message = refusal(make(tmp_path, *names), "train")
    assert words in message
    assert "globox convert" in message
    assert "download_dataset.sh" not in message
