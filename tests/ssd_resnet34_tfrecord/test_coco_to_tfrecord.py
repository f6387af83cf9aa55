"""The converter: the golden records again, what it leaves out or turns, bad input."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from common.coco.images import decode_image, exif_orientation, read_image
from common.coco.index import read_index as read_coco_index
from common.errors import UserError
from ssd_resnet34.tfrecord import coco_to_tfrecord
from ssd_resnet34.tfrecord.example import annotated_image, decode, values
from ssd_resnet34.tfrecord.index import read_index
from ssd_resnet34.tfrecord.records import read_records

ORIENTATION = 0x0112
# How a camera stores an upright picture, by the EXIF orientation that turns it back.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


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


def features_by_id(files):
    """The features of all records by image id."""
    found = {}
    for file in files:
        for payload in read_records(str(file)):
            features = decode(payload, "file")
            found[annotated_image(payload, "file").image_id] = features
    return found


def test_what_is_left_out_is_counted_and_leaves_empty_features(coco, convert, capsys):
    image_id = 403013
    dropped = [one for one in coco["annotations"] if one["image_id"] != image_id]
    dropped += coco["annotations"][-3:]  # of zero and of negative size, and over the edge
    coco["annotations"] = dropped
    features = features_by_id(convert(coco))
    assert list(values(features[image_id], "image/object/bbox/xmin", float, "file")) == []
    assert "image/object/bbox/xmin" in features[image_id]
    without_annotations = [one for one in features.values() if "image/object/area" not in one]
    assert len(without_annotations) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("note: box of negative size, not trained on: 1 (")
    assert printed[1].startswith("note: zero-size box, not trained on: 1 (")
    assert printed[-1] == (
        "42 of 45 boxes written; left out: 1 box of negative size, "
        "1 zero-size box, 1 over the image's edge"
    )


def test_an_image_that_has_only_unusable_boxes_has_features_of_boxes(coco, convert):
    image_id = 403013
    kept = [one for one in coco["annotations"] if one["image_id"] != image_id]
    empty = {"id": 5, "image_id": image_id, "category_id": 1, "bbox": [0, 0, 0, 0], "iscrowd": 0}
    coco["annotations"] = [*kept, empty]
    features = features_by_id(convert(coco))[image_id]
    assert list(values(features, "image/object/area", float, "file")) == []
    assert "image/object/area" in features


def test_no_box_left_is_an_error_only_where_there_are_boxes(coco, convert, capsys, tmp_path):
    annotations = coco["annotations"]
    coco["annotations"] = annotations[-3:]
    with pytest.raises(UserError, match=r"0 of 3 boxes written; left out: 1 box of .*edge; "):
        convert(coco)
    assert list(tmp_path.glob("out/*")) == []
    coco["annotations"] = []
    assert len(features_by_id(convert(coco))) == 6
    assert "0 of 0 boxes written\n" in capsys.readouterr().out


@pytest.mark.parametrize("area", [None, 0, 5.5])
def test_an_area_that_is_missing_is_width_times_height(coco, convert, area):
    annotation = coco["annotations"][0]
    annotation.pop("area")
    if area is not None:
        annotation["area"] = area
    coco["annotations"] = [annotation]
    features = features_by_id(convert(coco))[annotation["image_id"]]
    _, _, width, height = annotation["bbox"]
    (written,) = values(features, "image/object/area", float, "file")
    assert written == pytest.approx(area or width * height, rel=1e-6)


def test_boxes_are_divided_in_double(coco, convert):
    image = coco["images"][0]
    coco["images"] = [image]
    box = {"id": 1, "image_id": image["id"], "category_id": 1, "bbox": [0.1, 0.2, 100.3, 7.7]}
    coco["annotations"] = [{**box, "iscrowd": 1, "area": 5.5}]
    (payload,) = read_records(str(convert(coco)[0]))
    box = annotated_image(payload, "file").boxes_xyxy[0]
    width, height = image["width"], image["height"]
    expected = [0.1 / width, 0.2 / height, (0.1 + 100.3) / width, (0.2 + 7.7) / height]
    assert box.tolist() == np.float32(expected).tolist()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.pop("images"), "has no 'images'"),
        (lambda c: c.update(annotations=[3]), "unknown category"),
        (lambda c: c["annotations"][0].pop("bbox"), "box that is not 4 finite numbers: 1"),
        (lambda c: c["images"].insert(0, 5), "image id that is no whole number"),
        (
            lambda c: c["images"].append({**c["images"][0], "width": 9}),
            "image id of several images: 1",
        ),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), "box that is not 4 finite numbers"),
        (lambda c: c["annotations"][0].update(category_id=1000), "unknown category"),
        (lambda c: [one.update(name=3) for one in c["categories"]], "category name of several ids"),
        (lambda c: c["images"][0].update(width=0), "image width or height that is no number"),
        (lambda c: c["images"][0].update(width="wide"), "image width or height that is no number"),
        (lambda c: c["images"][0].update(file_name="none.jpg"), "image file missing: 1 .*none.jpg"),
    ],
)
def test_bad_input_is_refused_as_by_the_other_models_and_leaves_no_file(
    coco, convert, tmp_path, tiny_dir, change, complaint
):
    change(coco)
    with pytest.raises(UserError, match=complaint) as raised:
        convert(coco, 2)
    assert list(tmp_path.glob("out/*")) == []
    with pytest.raises(UserError) as other:
        read_coco_index(str(tmp_path / "instances.json"), str(tiny_dir / "train2017"))
    # The check is that of the other recipe.
    assert str(raised.value) == str(other.value).replace("; train.py", "; ssd_resnet34/train.py")


def test_a_file_that_is_no_image(coco, convert, tmp_path):
    for image in coco["images"]:
        (tmp_path / image["file_name"]).write_text("nothing")
    with pytest.raises(UserError, match="neither JPEG nor PNG"):
        convert(coco, 1, tmp_path)


def photograph(folder, orientation, size=(40, 30)):
    """Save a picture of (width, height) as a camera does; return its file and its COCO file."""
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    upright = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    stored = upright
    if STORED[orientation] is not None:
        stored = upright.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(folder / "photo.jpg", exif=exif, quality=95)
    image = {"id": 7, "file_name": "photo.jpg", "height": 30, "width": 40}
    box = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [24, 4, 10, 14]}
    category = {"id": 3, "name": "dog"}
    coco = {"images": [image], "annotations": [box], "categories": [category]}
    return folder / "photo.jpg", coco


@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_written_in_the_position_of_its_annotations(
    convert, tmp_path, capsys, orientation
):
    path, coco = photograph(tmp_path, orientation)
    (payload,) = read_records(str(convert(coco, image_dir=tmp_path)[0]))
    features = decode(payload, "file")
    image = annotated_image(payload, "file")
    printed = capsys.readouterr().out
    assert image.size == (30, 40)
    if orientation < 5:  # the stored pixels have the annotated size, and TensorFlow never turns
        assert image.encoded == path.read_bytes()
        assert "turned" not in printed
        return
    assert "1 of 1 images were turned by their EXIF orientation" in printed
    assert exif_orientation(image.encoded) == 1
    upright = read_image(path, ignore_exif=False).astype(int)
    assert np.abs(decode_image(image.encoded, "file") - upright).mean() < 1
    assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(image.encoded))) == 0
    assert list(values(features, "image/format", bytes, "file")) == [b"jpeg"]
    checksum = hashlib.sha256(image.encoded).hexdigest().encode()
    assert list(values(features, "image/key/sha256", bytes, "file")) == [checksum]


def test_an_image_of_another_size_is_refused_with_both(convert, tmp_path):
    _, coco = photograph(tmp_path, 6, size=(20, 10))
    with pytest.raises(UserError, match=r"photo\.jpg: is 10 x 20 pixels, 40 x 30 in the annot"):
        convert(coco, image_dir=tmp_path)
    assert list(tmp_path.glob("out/*")) == []


def test_from_the_command_line(coco, tiny_dir, tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    script = Path(coco_to_tfrecord.__file__)
    command = [sys.executable, script, f"--image_dir={tiny_dir / 'train2017'}"]
    command += ["--object_annotations_file", tmp_path / "instances.json"]
    command += [f"--output_file_prefix={tmp_path / 'train2017'}", "--num_shards"]
    done = subprocess.run([*command, "4"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 records in 4 files" in done.stdout
    assert "47 of 50 boxes written; left out: " in done.stdout
    done = subprocess.run([*command, "0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: --num_shards=0: give 1 or more"
