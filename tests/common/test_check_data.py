import json
from pathlib import Path

import pytest
from PIL import Image

from common.coco.check import DataReport, check_data, read_annotations
from common.coco.index import read_index
from common.npu.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
BOX = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}
IMAGE = {"id": 1, "file_name": "1.png", "height": 30, "width": 40}


def write(folder, annotations=(), images=(IMAGE,), categories=({"id": 3, "name": "dog"},)):
    path = folder / "a.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"bbox": [1, 2, float("nan"), 4]}, "not 4 finite numbers: 1 (image 1 annotation 1)"),
        ({"bbox": [1, 2, float("inf"), 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, 3]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, "3", 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, None, 4]}, "not 4 finite numbers"),
        ({"bbox": None}, "not 4 finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "box of negative size: 1 (image 1 annotation 1)"),
        ({"category_id": 4}, "unknown category (4): 1 (image 1 annotation 1)"),
        ({"category_id": "3"}, "without a usable id, image_id, category_id"),
        ({"id": None}, "without a usable id"),
        ({"image_id": [1]}, "without a usable id"),
        ({"id": 2**60}, "without a usable id"),
        ({"iscrowd": "0"}, "neither 0 nor 1"),
        ({"ignore": None}, "neither 0 nor 1"),
        ({"area": -1}, "area that is not a number"),
        ({"area": "12"}, "area that is not a number"),
    ],
)
def test_broken_annotations_are_refused(tmp_path, annotation, message):
    path = write(tmp_path, [{**BOX, **annotation}])
    with pytest.raises(UserError) as raised:
        read_index(path, str(tmp_path), need_images=False)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [IMAGE, {**IMAGE, "file_name": "2"}]}, "image id used twice: 1 (1)"),
        ({"images": [{**IMAGE, "height": 0}]}, "image size not positive: 1 (image 1 40 x 0)"),
        ({"images": [{**IMAGE, "width": 2**40}]}, "image size not positive"),
        ({"images": [{**IMAGE, "height": "30"}]}, "images[0]"),
        ({"images": [IMAGE, {"id": 2}]}, "images[1]"),
        ({"images": ["1.png"]}, "images[0]"),
        ({"images": [{**IMAGE, "file_name": 1}]}, "images[0]"),
        ({"images": {"1": IMAGE}}, 'no "images"'),
        ({"images": []}, 'no "images"'),
        ({"categories": []}, 'no "categories"'),
        ({"categories": [{"id": 3}]}, "categories[0]"),
        ({"categories": [{"id": 3, "name": n} for n in "ab"]}, "category id used twice: 1 (3)"),
        ({"categories": [{"id": i, "name": "a"} for i in (3, 4)]}, "name used twice: 1 ('a')"),
        ({"annotations": [BOX, BOX]}, "annotation id used twice: 1 (1)"),
        ({"annotations": {"1": BOX}}, 'no "annotations" list'),
        ({"annotations": [[1, 2, 3, 4]]}, "annotations[0]"),
    ],
)
def test_broken_files_are_refused(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as raised:
        read_index(path, str(tmp_path), need_images=False)
    assert message in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"images": [1]', "[" * 100_000, "é"])
def test_what_is_no_coco_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"a\.json: .*instances_\*\.json"):
        read_annotations(str(tmp_path / "a.json"), DataReport())


def test_missing_annotation_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        read_annotations(str(tmp_path / "none.json"), DataReport())


def test_skipped_and_kept_annotations_are_noted(tmp_path):
    boxes = {
        1: [1, 2, 3, 4],
        2: [1, 2, 0, 4],
        3: [40, 2, 3, 4],
        4: [-3, 2, 3, 4],
        5: [-2.5, 2, 3, 4],
        6: [37, 2, 4, 4],
        7: [1, 28, 3, 4],
    }
    annotations = [{**BOX, "id": i, "bbox": box} for i, box in boxes.items()]
    annotations.append({**BOX, "id": 8, "image_id": 99})
    report = DataReport()
    index = read_index(
        write(tmp_path, annotations), str(tmp_path), need_images=False, report=report
    )
    assert index.annotation_ids.tolist() == [1, 5, 6, 7]
    assert not report.errors
    assert report.lines() == [
        "note: unknown image, annotation skipped: 1 (image 99 annotation 8)",
        "note: zero-size box, skipped: 1 (image 1 annotation 2)",
        "note: box wholly outside its image, skipped: 2 "
        "(image 1 annotation 3; image 1 annotation 4)",
        "note: box more than 1 pixel over the edge, kept: 2 "
        "(image 1 annotation 5; image 1 annotation 7)",
    ]


def test_all_errors_come_in_one_line(tmp_path):
    annotations = [{**BOX, "id": i, "bbox": [1, 2, -1, 1]} for i in range(9)]
    annotations.append({**BOX, "id": 9, "category_id": 8})
    with pytest.raises(UserError, match="2 problems: ") as raised:
        read_index(write(tmp_path, annotations), str(tmp_path), need_images=False)
    assert "box of negative size: 9 (image 1 annotation 0;" in str(raised.value)
    assert str(raised.value).endswith("; ...); run with --check_data for the full list")


def test_lines_can_be_complete():
    report = DataReport()
    report.note("rule")
    assert report.lines() == []
    report.error("rule", *"abcdefg")
    assert report.lines() == ["error: rule: 7 (a; b; c; d; e; ...)"]
    assert report.lines(limit=None) == ["error: rule: 7 (a; b; c; d; e; f; g)"]


def test_polygons_do_not_matter(tmp_path):
    """The reader cuts polygons out of the text: wherever they stand, the rest is read alike."""
    polygon = [[1.5, 2, 3e-1, 4]]
    rle = {"counts": [1, 2], "size": [3, 4]}
    name = 'odd "segmentation": [1], name'
    annotations = [
        {"segmentation": polygon, **BOX},
        {**BOX, "id": 2, "segmentation": polygon},
        {"segmentation": [], **BOX, "id": 3},
        {**BOX, "id": 4, "segmentation": rle, "iscrowd": 1},
    ]
    path = write(tmp_path, annotations, categories=[{"id": 3, "name": name}])
    index = read_index(path, str(tmp_path), need_images=False)
    assert index.class_names == (name,)
    assert index.annotation_ids.tolist() == [1, 2, 3, 4]
    assert index.crowd.tolist() == [False, False, False, True]


def test_real_data_are_clean():
    report = check_data(
        str(TINY / "annotations/instances_val2017.json"), str(TINY / "val2017"), decode=False
    )
    assert report.lines() == []


def test_check_data_decodes_every_image(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [{**IMAGE, "id": i, "file_name": f"{i}.jpg"} for i in range(1, 7)]
    Image.new("RGB", (40, 30)).save(folder / "1.jpg")
    Image.new("RGB", (41, 30)).save(folder / "2.jpg")
    Image.new("RGB", (30, 40)).save(folder / "3.jpg", exif=exif)
    Image.new("RGB", (30, 40)).save(folder / "4.jpg")
    (folder / "5.jpg").write_text("no image")
    path = write(tmp_path, [{**BOX, "bbox": [0, 0, -1, 1]}], images)
    report = check_data(path, str(folder))
    assert report.errors == {
        "box of negative size": ["image 1 annotation 1"],
        f"image file missing in {folder}": ["6.jpg"],
        "image of another size than annotated": [
            "2.jpg: 41 x 30, annotated 40 x 30",
            "4.jpg: 30 x 40, annotated 40 x 30",
        ],
        "image that cannot be decoded": ["5.jpg"],
    }
    (note,) = report.notes.items()
    assert "EXIF" in note[0]
    assert note[1] == ["3.jpg"]
    assert "image that cannot be decoded" not in check_data(path, str(folder), decode=False).errors
