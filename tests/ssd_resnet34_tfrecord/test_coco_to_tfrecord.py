"""The converter: the golden records again, what it drops, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from ssd_resnet34.tfrecord import coco_to_tfrecord
from ssd_resnet34.tfrecord.example import annotated_image, decode
from ssd_resnet34.tfrecord.index import read_index
from ssd_resnet34.tfrecord.records import read_records


@pytest.fixture
def coco(golden_dir):
    return json.loads((golden_dir / "instances_train6.json").read_text())


@pytest.fixture
def convert(tmp_path, tiny_dir):
    """`convert(coco, shards)`: the written files."""

    def run(coco, shards=1, image_dir=tiny_dir / "train2017"):
        file = tmp_path / "instances.json"
        file.write_text(coco if isinstance(coco, str) else json.dumps(coco))
        coco_to_tfrecord.convert(image_dir, file, tmp_path / "out/val2017", shards)
        return sorted((tmp_path / "out").iterdir())

    return run


def test_the_golden_records_again(golden_dir, coco, convert):
    files = convert(coco, 2)
    assert [file.name for file in files] == [f"val2017-0000{k}-of-00002.tfrecord" for k in (0, 1)]
    for k, file in enumerate(files):
        expected = golden_dir / f"train2017-0000{k}-of-00002.tfrecord"
        for ours, theirs in zip(read_records(str(file)), read_records(str(expected)), strict=True):
            ours, theirs = decode(ours, "ours"), decode(theirs, "theirs")
            assert set(ours) == set(theirs)
            assert all(ours[name] == theirs[name] for name in theirs)


def test_the_same_file_twice(coco, convert):
    first = [file.read_bytes() for file in convert(coco, 3)]
    assert [file.read_bytes() for file in convert(coco, 3)] == first


def test_more_shards_than_images_leaves_empty_files(coco, convert):
    files = convert(coco, 8)
    assert [file.stat().st_size > 0 for file in files] == [True] * 6 + [False] * 2
    assert len(read_index(str(files[0].parent / "val2017*"), "flag")) == 6


def test_dropped_boxes_leave_empty_features(coco, convert):
    coco["images"] = coco["images"][:1]
    coco["annotations"] = coco["annotations"][-3:]
    (payload,) = read_records(str(convert(coco)[0]))
    features = decode(payload, "file")
    assert "image/object/bbox/xmin" in features
    assert annotated_image(payload, "file").boxes_xyxy.shape == (0, 4)


def test_boxes_are_divided_in_double(coco, convert):
    image = coco["images"][0]
    coco["images"] = [image]
    coco["annotations"] = [
        {"image_id": image["id"], "category_id": 1, "bbox": [0.1, 0.2, 100.3, 7.7], "iscrowd": 1,
         "area": 5.5}
    ]  # fmt: skip
    (payload,) = read_records(str(convert(coco)[0]))
    box = annotated_image(payload, "file").boxes_xyxy[0]
    width, height = image["width"], image["height"]
    expected = [0.1 / width, 0.2 / height, (0.1 + 100.3) / width, (0.2 + 7.7) / height]
    assert box.tolist() == np.float32(expected).tolist()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.pop("images"), "no images"),
        (lambda c: c.update(annotations=[3]), "no images"),
        (lambda c: c["annotations"][0].pop("bbox"), "image number 0 or one of its"),
        (lambda c: c["annotations"][0].update(image_id=[]), "no images"),
        (lambda c: c["images"].insert(0, 5), "image number 0 or one of its"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), "image number 0 or one of its"),
        (lambda c: c["annotations"][0].update(category_id=1000), "image number 0 or one of its"),
        (lambda c: [one.update(name=3) for one in c["categories"]], "image number 0 or one of its"),
        (lambda c: c["images"][0].update(width=0), "image number 0 or one of its"),
        (lambda c: c["images"][0].update(width="wide"), "image number 0 or one of its"),
        (lambda c: c["images"][0].update(file_name="none.jpg"), "none.jpg: No such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(coco, convert, tmp_path, change, complaint):
    change(coco)
    with pytest.raises(UserError, match=complaint):
        convert(coco, 2)
    assert list(tmp_path.glob("out/*")) == []


def test_a_file_that_is_no_image(coco, convert, tmp_path):
    for image in coco["images"]:
        (tmp_path / image["file_name"]).write_text("nothing")
    with pytest.raises(UserError, match="neither JPEG nor PNG"):
        convert(coco, 1, tmp_path)


def test_from_the_command_line(golden_dir, tiny_dir, tmp_path):
    script = Path(coco_to_tfrecord.__file__)
    command = [sys.executable, script, f"--image_dir={tiny_dir / 'train2017'}"]
    command += ["--object_annotations_file", golden_dir / "instances_train6.json"]
    command += [f"--output_file_prefix={tmp_path / 'train2017'}", "--num_shards"]
    done = subprocess.run([*command, "4"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 records in 4 files" in done.stdout
    done = subprocess.run([*command, "0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: --num_shards=0: give 1 or more"
