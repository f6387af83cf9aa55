import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from common.coco.index import Findings, Rule, Severity, read_annotations, read_index
from common.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
TRAIN = TINY / "annotations" / "instances_train2017.json"


@pytest.fixture
def coco(tmp_path):
    """A writer of small annotation files: two images, categories 7 "cat" and 3 "dog"."""

    def write(name="a.json", **changes):
        box = {"image_id": 20, "category_id": 3, "bbox": [1, 2, 3, 4]}
        content = {
            "images": [
                {"id": 20, "file_name": "b/é猫.jpg", "height": 30, "width": 40},
                {"id": 10, "file_name": "a.jpg", "height": 50, "width": 60},
            ],
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
            "annotations": [
                {**box, "id": 1},
                {**box, "id": 2, "image_id": 10, "category_id": 7, "iscrowd": 1, "area": 2.5},
                {**box, "id": 3, "ignore": 1},
            ],
        } | changes
        (tmp_path / "images" / "b").mkdir(parents=True, exist_ok=True)
        for image in content["images"]:
            (tmp_path / "images" / image["file_name"]).touch()
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name), str(tmp_path / "images")

    return write


def test_index_of_real_annotations_equals_the_file():
    coco = json.loads(TRAIN.read_text())
    index = read_index(str(TRAIN), str(TINY / "train2017"))
    assert index.class_names == tuple(c["name"] for c in coco["categories"])
    assert index.category_ids == tuple(c["id"] for c in coco["categories"])
    for i, image in enumerate(coco["images"]):
        mine = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        rows = index.annotations(i)
        assert index.image_ids[i] == image["id"]
        assert tuple(index.sizes[i]) == (image["height"], image["width"])
        assert Path(index.path(i)).is_file()
        assert rows.id.tolist() == [a["id"] for a in mine]
        assert set(rows.image_id.tolist()) <= {image["id"]}
        assert rows.box_xywh.tolist() == [a["bbox"] for a in mine]
        assert rows.area.tolist() == [a["area"] for a in mine]
        assert rows.crowd.tolist() == [a["iscrowd"] == 1 for a in mine]
        assert [index.category_ids[k] for k in rows.label] == [a["category_id"] for a in mine]
    assert index.offsets[-1] == len(coco["annotations"])


def test_slim_files_order_and_names(coco):
    index = read_index(*coco())
    assert len(index) == 2
    assert index.image_ids.tolist() == [20, 10]
    assert index.table.id.tolist() == [1, 3, 2]
    assert index.table.image_id.tolist() == [20, 20, 10]
    assert index.table.label.tolist() == [1, 1, 0]
    assert index.table.crowd.tolist() == [False, False, True]
    assert index.table.ignore.tolist() == [False, True, False]
    np.testing.assert_array_equal(index.table.area, [np.nan, np.nan, 2.5])
    assert index.path(0).endswith("b/é猫.jpg")
    assert Path(index.path(0)).is_file()
    assert index.max_boxes() == 16
    with pytest.raises(IndexError):
        index.annotations(2)


def test_no_python_object_per_image(coco):
    index = pickle.loads(pickle.dumps(read_index(*coco())))
    arrays = [v for v in vars(index).values() if isinstance(v, np.ndarray)]
    assert len(arrays) == 6
    assert all(not array.dtype.hasobject and array.base is None for array in arrays)


def test_subset_by_mask_and_by_position():
    index = read_index(str(TRAIN), str(TINY / "train2017"))
    positions = np.array([31, 4, 4, 49])
    part = index.subset(positions)
    assert part.image_ids.tolist() == index.image_ids[positions].tolist()
    for i, position in enumerate(positions):
        whole, cut = index.annotations(position), part.annotations(i)
        assert cut.tobytes() == whole.tobytes()
        assert part.path(i) == index.path(position)
    mask = np.diff(index.offsets) > 5
    assert index.subset(mask).image_ids.tolist() == index.image_ids[mask].tolist()
    assert np.diff(index.subset(mask).offsets).min() > 5
    nothing = index.subset([])
    assert (len(nothing), len(nothing.table), nothing.max_boxes()) == (0, 0, 16)
    assert nothing.offsets.tolist() == [0]


def test_classes_of_a_checkpoint_map_by_name(coco):
    index = read_index(*coco(), classes=("bird", "dog", "cat"))
    assert index.class_names == ("bird", "dog", "cat")
    assert index.category_ids == (-1, 3, 7)
    assert index.table.label.tolist() == [1, 1, 2]
    with pytest.raises(UserError, match=r"not among the 2 classes.*'cat'"):
        read_index(*coco(), classes=("dog", "bird"))


def test_the_severity_of_a_rule_decides_and_not_its_text(coco):
    index = read_index(*coco())
    index.report[Rule("error: kept", Severity.NOTE)] = Findings.of(["b"])
    index.report[Rule("error: skipped", Severity.SKIP)] = Findings.of(["c"])
    index.report[Rule("of a file", Severity.SKIP, file="b.json")] = Findings.of(["d"])
    index.raise_errors()
    index.report[Rule("a note that is kept", Severity.ERROR)] = Findings.of(list("abcd"))
    index.report[Rule("nothing is wrong", Severity.ERROR)] = Findings.of([])
    index.report[Rule("another", Severity.ERROR)] = Findings.of(["e"])
    assert index.lines(limit=2) == [
        "note: error: kept: 1 (b)",
        "note: error: skipped, not trained on: 1 (c)",
        "b.json: note: of a file, not trained on: 1 (d)",
        "error: a note that is kept: 4 (a; b)",
        "error: another: 1 (e)",
    ]
    with pytest.raises(UserError) as raised:
        index.raise_errors()
    hint = "train.py --check_data lists them in full"
    errors = "a note that is kept: 4 (a; b; c); another: 1 (e)"
    assert str(raised.value) == f"{index.annotation_file}: {errors}; {hint}"


def test_file_without_annotations_is_legal(coco):
    path, images = coco()
    content = json.loads(Path(path).read_text())
    del content["annotations"]
    Path(path).write_text(json.dumps(content))
    index = read_index(path, images)
    assert (len(index), len(index.table), index.table.box_xywh.shape) == (2, 0, (0, 4))
    assert len(index.annotations(1)) == 0
    assert index.max_boxes() == 16


def test_missing_images_are_named(coco, tmp_path):
    path, images = coco()
    (tmp_path / "images" / "b" / "é猫.jpg").unlink()
    with pytest.raises(UserError, match=r"image file missing: 1 \(.*images/b/é猫\.jpg\)"):
        read_index(path, images)
    assert len(read_annotations(path)) == 2
    with pytest.raises(UserError, match=r"image file missing: 2 \(.*nowhere/b/"):
        read_index(path, str(tmp_path / "nowhere"))
