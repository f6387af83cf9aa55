import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.coco.check import check_data
from common.coco.coverage import Matching, Presets
from common.coco.index import read_annotations, read_index
from common.coco.layout import Files
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
            "not 4 finite numbers: 1 (image 1 annotation 1 category 3: bbox [1, 2, nan, 4])",
        ),
        ({"bbox": [1, 2, float("inf"), 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, 3]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, "3 px", 4]}, "not 4 finite numbers"),
        ({"bbox": [1, 2, None, 4]}, "not 4 finite numbers"),
        ({"bbox": None}, "not 4 finite numbers"),
        (
            {"category_id": 4},
            "unknown category: 1 (image 1 annotation 1 category 4: category_id 4)",
        ),
        ({"bbox": "1234"}, "not 4 finite numbers"),
        ({"category_id": "dog"}, "unknown category: 1 (image 1 annotation 1 category 'dog'"),
        (
            {"iscrowd": "no"},
            "iscrowd that is not 0 or 1: 1 (image 1 annotation 1 category 3: iscrowd",
        ),
        ({"iscrowd": 2}, "iscrowd that is not 0 or 1"),
        ({"ignore": "maybe"}, "ignore that is not 0 or 1"),
        ({"area": "large"}, "area that is no number: 1 (image 1 annotation 1 category 3: area 'la"),
        ({"area": float("inf")}, "area that is no number"),
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
            "image id of several images: 1 (entry 0 with id 1: id 1)",
        ),
        (
            {"images": [{**IMAGE, "height": 0}]},
            "image width or height that is no number above 0: 1 (entry 0 with id 1: width 40, "
            "height 0)",
        ),
        ({"images": [{**IMAGE, "width": 2**40}]}, "image width or height"),
        ({"images": [{**IMAGE, "height": "30 px"}]}, "image width or height"),
        ({"images": [{**IMAGE, "width": None}]}, "image width or height"),
        (
            {"images": [IMAGE, {"id": 2}]},
            "image width or height that is no number above 0: 1 (entry 1",
        ),
        (
            {"images": [IMAGE, "1.png"]},
            "image id that is no whole number from 0 to 2**53: 1 (entry 1 with id",
        ),
        ({"images": [{**IMAGE, "id": 1.5}]}, "image id that is no whole number"),
        ({"images": [{**IMAGE, "file_name": 1}]}, "image file missing"),
        ({"images": [{"id": 1, "height": 3, "width": 4}]}, "image without file_name"),
        ({"images": {"1": IMAGE}}, "its 'images' are no list"),
        ({"images": []}, "has no 'images'"),
        ({"categories": []}, "has no 'categories'"),
        ({"categories": [{"id": 3}]}, "category without a name: 1 (entry 0 with id 3: name None)"),
        (
            {"categories": [{"id": 3, "name": n} for n in "ab"]},
            "category id of several names: 1 (entry 0",
        ),
        (
            {
                "categories": [{"id": i, "name": "a"} for i in (3, 4)],
                "annotations": [BOX, {**BOX, "id": 2, "category_id": 4}],
            },
            "category name of several ids that boxes use: 1 (entry 1 with id 4: name 'a')",
        ),
        ({"annotations": {"1": BOX}}, "its 'annotations' are no list"),
        (
            {"annotations": [[1, 2, 3, 4]]},
            "unknown category: 1 (entry 0 with id None: category_id None)",
        ),
    ],
)
def test_broken_files_are_refused(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as raised:
        read_index(path, str(tmp_path))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no JSON: Expecting value: line 1 column 1"),
        ('{"images": [1]\n"', r"no JSON: .*line 2 column 1"),
        ("[]", "holds a list, no dictionary"),
        ("3", "holds a int, no dictionary"),
        ("[" * 100_000, "no JSON: "),
    ],
)
def test_what_is_no_coco_file_is_refused(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=rf"a\.json: {reason}.*instances_\*\.json"):
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
        8: [9, 9, -3, 4],
    }
    annotations = [{**BOX, "id": i, "bbox": box} for i, box in boxes.items()]
    annotations.append({**BOX, "id": 9, "image_id": 99})
    path = write(tmp_path, annotations)
    index = read_index(path, str(tmp_path))
    assert index.table.id.tolist() == [1, 5, 6, 7]
    assert index.offsets.tolist() == [0, 4]
    assert index.lines() == [
        "note: box of negative size, not trained on: 1 (image 1 annotation 8 category 3: bbox "
        "[9, 9, -3, 4])",
        "note: annotation of an unknown image, not trained on: 1 (image 99 annotation 9 category "
        "3: image_id 99)",
        "note: zero-size box, not trained on: 1 (image 1 annotation 2 category 3: bbox "
        "[1, 2, 0, 4])",
        "note: box wholly outside its image, not trained on: 2 (image 1 annotation 3 category 3: "
        "bbox [40, 2, 3, 4]; image 1 annotation 4 category 3: bbox [-3, 2, 3, 4])",
        "note: box more than 1 pixel over the edge, kept: 2 (image 1 annotation 5 category 3: bbox "
        "[-2.5, 2, 3, 4]; image 1 annotation 7 category 3: bbox [1, 28, 3, 4])",
    ]
    assert read_annotations(path).table.id.tolist() == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]  # for the evaluation


def test_all_errors_come_in_one_line(tmp_path):
    annotations = [{**BOX, "id": i, "bbox": [1, 2, 1]} for i in range(9)]
    annotations.append({**BOX, "id": 9, "category_id": 8})
    with pytest.raises(UserError, match="unknown category: 1 ") as raised:
        read_index(write(tmp_path, annotations), str(tmp_path))
    assert (
        "box that is not 4 finite numbers: 9 (image 1 annotation 0 category 3: bbox [1, 2, 1];"
        in str(raised.value)
    )
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


# A model that sees every box.
ALL_SEEN = Matching(
    kind="anchors",
    fields=(),
    input_size=lambda recipe: "any",
    boxes_in_input=lambda boxes, image_sizes, recipe: boxes,
    seen_boxes=lambda boxes, recipe: np.ones(len(boxes), dtype=bool),
    seen="it is there",
    unseen="none",
)


def check(training, *validation, folder, untrained=lambda index: {}):
    """Check a training set and others, each an annotation file and an image folder."""
    named = [Files(*pair, "as named") for pair in (training, *validation)]
    presets = Presets("all", None, {}, ALL_SEEN)
    output_dir = folder / "output"
    return check_data(named[:1], named[1:], untrained, True, output_dir, presets)


def found(capsys):
    """The lines printed before the boxes are counted."""
    lines = capsys.readouterr().out.splitlines()
    counted = [number for number, line in enumerate(lines) if line == "training set:"]
    return lines[: counted[0]] if counted else lines


def test_real_data_are_clean(tmp_path, capsys):
    files = str(TINY / "annotations/instances_val2017.json"), str(TINY / "val2017")
    assert check(files, folder=tmp_path) == 0
    assert found(capsys) == [
        f"{Files(*files, 'as named')}: 0 errors, 0 notes",
        "  382 of 382 boxes are trained on",
    ]


def test_the_same_files_may_be_both_sets(tmp_path, capsys):
    files = str(TINY / "annotations/instances_val2017.json"), str(TINY / "val2017")
    assert check(files, files, folder=tmp_path) == 0
    headline = f"{Files(*files, 'as named')}: 0 errors, 0 notes"
    assert found(capsys) == [headline, "  382 of 382 boxes are trained on", headline]
    assert (tmp_path / "output_check_data.png").is_file()


def test_check_data_lists_everything(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    images = [{**IMAGE, "id": i, "file_name": f"{i}.jpg"} for i in range(1, 6)]
    Image.new("RGB", (40, 30)).save(folder / "1.jpg")
    Image.new("RGB", (30, 40)).save(folder / "2.jpg")
    (folder / "3.jpg").write_text("no image")
    Image.effect_noise((40, 30), 50).save(folder / "4.jpg")
    (folder / "4.jpg").write_bytes((folder / "4.jpg").read_bytes()[:700])
    annotations = [{**BOX, "id": i, "bbox": [0, 0, 1]} for i in range(30)]
    annotations.append({**BOX, "id": 30, "bbox": [0, 0, 0, 1]})
    path = write(tmp_path, annotations, images)
    report_file = tmp_path / "output_check_data.txt"
    assert check((path, str(folder)), (path, str(folder)), folder=tmp_path) == 1
    broken = [f"image 1 annotation {i} category 3: bbox [0, 0, 1]" for i in range(30)]
    headline = f"{Files(path, folder, 'as named')}: 34 errors, 1 notes"
    lines = [
        headline,
        f"  error: box that is not 4 finite numbers: 30 ({'; '.join(broken[:20])})",
        "  note: zero-size box, not trained on: 1 (image 1 annotation 30 category 3: bbox "
        "[0, 0, 0, 1])",
        f"  error: image file missing: 1 ({folder}/5.jpg)",
        "  error: image that cannot be read, or of another size than annotated: 3 "
        f"({folder}/2.jpg: is 30 x 40 pixels, 40 x 30 in the annotation file; "
        f"{folder}/3.jpg: cannot read the image (not an image in a format that Pillow knows); "
        f"{folder}/4.jpg: cannot read the image (image file is truncated (0 bytes not processed)))",
    ]
    # How many bytes are left depends on the noise.
    printed = re.sub(r"\d+ bytes not processed", "0 bytes not processed", capsys.readouterr().out)
    assert printed.splitlines() == [
        *lines,
        *lines,
        f"all of them: {report_file}",
        "the boxes are counted once the training set has no error",
    ]
    assert not (tmp_path / "output_check_data.png").exists()
    report = report_file.read_text()
    assert report.count(headline) == 2
    assert report.count(f"box that is not 4 finite numbers: 30 ({'; '.join(broken)})") == 2


def test_turned_images_and_trained_boxes_are_counted(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (IMAGE["height"], IMAGE["width"])).save(folder / "1.jpg", exif=exif)
    path = write(tmp_path, [BOX, {**BOX, "id": 2, "iscrowd": 1}], [{**IMAGE, "file_name": "1.jpg"}])
    files = path, str(folder)
    crowds = lambda index: {"iscrowd": index.table.crowd}  # noqa: E731
    assert check(files, folder=tmp_path, untrained=crowds) == 0
    assert found(capsys) == [
        f"{Files(path, folder, 'as named')}: 0 errors, 0 notes",
        "  1 of 1 images were turned by their EXIF orientation, as their annotated sizes ask",
        "  1 of 2 boxes are trained on; left out: 1 iscrowd",
    ]
    everything = lambda index: {"any": index.table.id > 0}  # noqa: E731
    assert check(files, folder=tmp_path, untrained=everything) == 1
    assert "  error: " in capsys.readouterr().out


def test_check_data_compares_the_classes(tmp_path, capsys):
    names = [{"id": 3, "name": "dog"}], [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (IMAGE["width"], IMAGE["height"])).save(tmp_path / "images/1.jpg")
    paths = []
    for number, categories in enumerate(names):
        (tmp_path / str(number)).mkdir()
        images = [{**IMAGE, "file_name": "1.jpg"}]
        used = {**BOX, "category_id": categories[-1]["id"]}
        paths.append(write(tmp_path / str(number), [used], images, categories))
    folder = str(tmp_path / "images")
    assert check((paths[1], folder), (paths[0], folder), folder=tmp_path) == 0
    assert check((paths[0], folder), (paths[1], folder), folder=tmp_path) == 1
    printed = capsys.readouterr().out
    assert "error: category not among the 1 classes trained on: 1 ('cat')" in printed
