import json
from pathlib import Path

import pytest
from PIL import Image

from common.coco.check import check_data
from common.coco.index import read_annotations, read_index
from common.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
BOX = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}
IMAGE = {"id": 1, "file_name": "1.png", "height": 30, "width": 40}


def write(folder, annotations=(), images=(IMAGE,), categories=({"id": 3, "name": "dog"},)):
    path = folder / "a.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    (folder / "1.png").touch()
    return str(path)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (
            {"bbox": [1, 2, float("nan"), 4]},
            "not 4 finite numbers: 1 (image 1 annotation 1 category 3)",
        ),
        ({"bbox": [1, 2, float("inf"), 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, 3]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, "3", 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, None, 4]}, "not 4 finite numbers"),
        ({"bbox": None}, "not 4 finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "box of negative size: 1 (image 1 annotation 1 category 3)"),
        ({"category_id": 4}, "unknown category: 1 (image 1 annotation 1 category 4)"),
        ({"bbox": "1234"}, "not 4 finite numbers"),
        ({"category_id": "3"}, "unknown category: 1 (image 1 annotation 1 category '3')"),
        (
            {"id": None},
            "annotation id unusable or repeated: 1 (image 1 annotation None category 3)",
        ),
        ({"id": 1.5}, "annotation id unusable"),
        ({"id": -1}, "annotation id unusable"),
        ({"id": 2**60}, "annotation id unusable"),
        ({"iscrowd": "0"}, "iscrowd or ignore out of range"),
        ({"iscrowd": 2}, "iscrowd or ignore out of range"),
        ({"ignore": None}, "iscrowd or ignore out of range"),
        ({"area": -1}, "area, iscrowd or ignore out of range"),
        ({"area": "12"}, "area, iscrowd or ignore out of range"),
    ],
)
def test_broken_annotations_are_refused(tmp_path, annotation, message):
    path = write(tmp_path, [{**BOX, **annotation}])
    with pytest.raises(UserError) as raised:
        read_index(path, str(tmp_path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": [IMAGE, {**IMAGE, "file_name": "2"}]},
            "image id or size unusable, or id repeated: 1 (entry 0 with id 1)",
        ),
        ({"images": [{**IMAGE, "height": 0}]}, "image id or size unusable"),
        ({"images": [{**IMAGE, "width": 2**40}]}, "image id or size unusable"),
        ({"images": [{**IMAGE, "height": "30"}]}, "image id or size unusable"),
        (
            {"images": [IMAGE, {"id": 2}]},
            "image id or size unusable, or id repeated: 1 (entry 1 with id 2)",
        ),
        (
            {"images": [IMAGE, "1.png"]},
            "image id or size unusable, or id repeated: 1 (entry 1 with id None)",
        ),
        ({"images": [{**IMAGE, "id": "1"}]}, "image id or size unusable"),
        ({"images": [{**IMAGE, "file_name": 1}]}, "image file missing"),
        ({"images": [{"id": 1, "height": 3, "width": 4}]}, "image file missing"),
        ({"images": {"1": IMAGE}}, "no images and categories"),
        ({"images": []}, "no images and categories"),
        ({"categories": []}, "no images and categories"),
        (
            {"categories": [{"id": 3}]},
            "category id or name unusable or repeated: 1 (entry 0 with id 3)",
        ),
        (
            {"categories": [{"id": 3, "name": n} for n in "ab"]},
            "name unusable or repeated: 1 (entry 0",
        ),
        (
            {"categories": [{"id": i, "name": "a"} for i in (3, 4)]},
            "repeated: 1 (entry 1 with id 4)",
        ),
        (
            {"annotations": [BOX, BOX]},
            "annotation id unusable or repeated: 1 (image 1 annotation 1 category 3)",
        ),
        ({"images": [{**IMAGE, "width": None}]}, "image id or size unusable"),
        (
            {"images": [{key: IMAGE[key] for key in ("id", "height", "file_name")}]},
            "image id or size unusable, or id repeated: 1 (entry 0 with id 1)",
        ),
        ({"annotations": {"1": BOX}}, "no images and categories"),
        (
            {"annotations": [[1, 2, 3, 4]]},
            "annotation id unusable or repeated: 1 (entry 0 with id None)",
        ),
    ],
)
def test_broken_files_are_refused(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as raised:
        read_index(path, str(tmp_path))
    assert message in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"images": [1]', "[" * 100_000, "é"])
def test_what_is_no_coco_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"a\.json: .*instances_\*\.json"):
        read_annotations(str(tmp_path / "a.json"))


def test_missing_annotation_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        read_annotations(str(tmp_path / "none.json"))


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
    path = write(tmp_path, annotations)
    index = read_index(path, str(tmp_path))
    assert index.table.id.tolist() == [1, 5, 6, 7]
    assert index.offsets.tolist() == [0, 4]
    assert index.lines() == [
        "note: unknown image, annotation skipped: 1 (image 99 annotation 8 category 3)",
        "note: zero-size box, skipped: 1 (image 1 annotation 2 category 3)",
        "note: box wholly outside its image, skipped: 2 "
        "(image 1 annotation 3 category 3; image 1 annotation 4 category 3)",
        "note: box more than 1 pixel over the edge, kept: 2 "
        "(image 1 annotation 5 category 3; image 1 annotation 7 category 3)",
    ]
    assert read_annotations(path).table.id.tolist() == [1, 2, 3, 4, 5, 6, 7]  # for the evaluation


def test_all_errors_come_in_one_line(tmp_path):
    annotations = [{**BOX, "id": i, "bbox": [1, 2, -1, 1]} for i in range(9)]
    annotations.append({**BOX, "id": 9, "category_id": 8})
    with pytest.raises(UserError, match="unknown category: 1 ") as raised:
        read_index(write(tmp_path, annotations), str(tmp_path))
    assert "box of negative size: 9 (image 1 annotation 0 category 3;" in str(raised.value)
    assert "annotation 2 " in str(raised.value)
    assert "annotation 3 " not in str(raised.value)
    assert str(raised.value).endswith("--check_data lists them in full")


def test_polygons_do_not_matter(tmp_path):
    """The reader cuts polygons out of the text: wherever they stand, the rest is read alike."""
    polygon = [[1.5, 2, 3e-1, 4]]
    rle = {"counts": [1, 2], "size": [3, 4]}
    name = 'odd "segmentation": [1], name'
    annotations = [
        {"segmentation": polygon, **BOX},
        {**BOX, "id": 2, "segmentation": polygon},
        {"segmentation": [], **BOX, "id": 3},
        {**BOX, "id": 5, "segmentation": polygon * 2},
        {"segmentation": polygon * 3, **BOX, "id": 6},
        {**BOX, "id": 4, "segmentation": rle, "iscrowd": 1},
    ]
    path = write(tmp_path, annotations, categories=[{"id": 3, "name": name}])
    index = read_index(path, str(tmp_path))
    assert index.class_names == (name,)
    assert index.table.id.tolist() == [1, 2, 3, 5, 6, 4]
    assert index.table.crowd.tolist() == [*[False] * 5, True]


def test_real_data_are_clean(capsys):
    files = str(TINY / "annotations/instances_val2017.json"), str(TINY / "val2017")
    assert check_data(files) == 0
    assert capsys.readouterr().out == f"{files[0]}: 0 errors, 0 notes\n"


def test_check_data_lists_everything(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    images = [{**IMAGE, "id": i, "file_name": f"{i}.jpg"} for i in range(1, 6)]
    Image.new("RGB", (40, 30)).save(folder / "1.jpg")
    Image.new("RGB", (30, 40)).save(folder / "2.jpg")
    (folder / "3.jpg").write_text("no image")
    Image.effect_noise((40, 30), 50).save(folder / "4.jpg")
    (folder / "4.jpg").write_bytes((folder / "4.jpg").read_bytes()[:700])
    annotations = [{**BOX, "id": i, "bbox": [0, 0, -1, 1]} for i in range(9)]
    annotations.append({**BOX, "id": 9, "bbox": [0, 0, 0, 1]})
    path = write(tmp_path, annotations, images)
    assert check_data((path, str(folder)), (path, str(folder))) == 1
    negative = "; ".join(f"image 1 annotation {i} category 3" for i in range(9))
    broken = "cannot read the image (truncated, or not an image)"
    expected = [
        f"{path}: 2 errors, 1 notes",
        f"  error: box of negative size: 9 ({negative})",
        "  note: zero-size box, skipped: 1 (image 1 annotation 9 category 3)",
        "  error: image that cannot be read, or of another size than annotated: 4 "
        f"({folder}/2.jpg: 30 x 40; {folder}/3.jpg: {broken}; {folder}/4.jpg: {broken}; "
        f"{folder}/5.jpg: cannot read the image (No such file or directory))",
    ]
    assert capsys.readouterr().out.splitlines() == expected * 2


def test_check_data_compares_the_classes(tmp_path, capsys):
    names = [{"id": 3, "name": "dog"}], [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (IMAGE["width"], IMAGE["height"])).save(tmp_path / "images/1.jpg")
    paths = []
    for number, categories in enumerate(names):
        (tmp_path / str(number)).mkdir()
        images = [{**IMAGE, "file_name": "1.jpg"}]
        paths.append(write(tmp_path / str(number), images=images, categories=categories))
    folder = str(tmp_path / "images")
    assert check_data((paths[1], folder), (paths[0], folder)) == 0
    assert check_data((paths[0], folder), (paths[1], folder)) == 1
    printed = capsys.readouterr().out
    assert "error: category not among the 1 classes trained on: 1 ('cat')" in printed
