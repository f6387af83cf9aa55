"""Classes of own category ids: which source says them, and what a run makes of them."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.coco.evaluation import EvaluationOptions
from common.coco.index import COCO_CLASSES
from common.errors import UserError
from common.npu import checkpoint
from ssd_resnet34.tfrecord import evaluate, train
from ssd_resnet34.tfrecord.categories import find_categories, require_known_categories
from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from ssd_resnet34.tfrecord.config import COCO_CATEGORY_IDS
from ssd_resnet34.tfrecord.data import build_loader
from ssd_resnet34.tfrecord.example import encode
from ssd_resnet34.tfrecord.index import names_of_categories, read_index
from ssd_resnet34.tfrecord.records import RecordWriter
from tests.ssd_resnet34_tfrecord.checks import check
from tests.ssd_resnet34_tfrecord.test_example import GOOD

FLAG = "--training_file_pattern"
OWN_CATEGORIES = [{"id": 40, "name": "boat"}, {"id": 2, "name": "buoy"}, {"id": 7, "name": "crew"}]


def picture():
    """A black JPEG of 60 x 40 pixels with a white box."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 10:40] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def records_of(path, *categories):
    """The index of a file with a record of one box for each (id, name); None for no name."""
    with RecordWriter(path) as writer:
        for category_id, name in categories:
            features = GOOD | {"image/object/class/label": (int, [category_id])}
            if name is not None:
                features["image/object/class/text"] = (bytes, [name.encode()])
            writer.write(encode(features))
    return read_index(str(path), FLAG)


def annotation_file(path, categories=OWN_CATEGORIES):
    """Write a COCO file of two images whose boxes show the categories 40 and 2."""
    images = []
    annotations = []
    for number, category_id in ((1, 40), (2, 2)):
        name = f"{number}.jpg"
        (path.parent / name).write_bytes(picture())
        images.append({"id": number, "file_name": name, "height": 40, "width": 60})
        box = {"id": number, "image_id": number, "bbox": [10, 10, 30, 20], "area": 600}
        annotations.append({**box, "category_id": category_id, "iscrowd": 0})
    coco = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(coco))
    return str(path)


def test_the_flag_comes_before_the_resumed_run_the_file_and_the_records(tmp_path):
    records = records_of(tmp_path / "records", (40, "boat"), (2, "buoy"), (2, "buoy"))
    file = annotation_file(tmp_path / "own.json")
    resumed = {"category_ids": [5, 3], "classes": ["oar", "sail"]}
    found = find_categories((9, 2), resumed, file, records)
    assert found.line() == "2 classes, from --category_ids: 9 9, 2 buoy"
    found = find_categories(None, resumed, file, records)
    assert found.line() == "2 classes, from the run that is resumed: 5 oar, 3 sail"
    found = find_categories(None, None, file, records)
    assert found.line() == f"3 classes, from --val_json_file={file}: 2 buoy, 7 crew, 40 boat"
    for missing in ("", str(tmp_path / "none.json")):
        found = find_categories(None, None, missing, records)
        assert found.line() == "2 classes, from the records: 2 buoy, 40 boat"


def test_a_root_that_the_records_use_is_a_class(tmp_path):
    records = records_of(tmp_path / "records", (0, "vessels"), (2, "buoy"))
    root = {"id": 0, "name": "vessels"}
    under_it = [{**category, "supercategory": "vessels"} for category in OWN_CATEGORIES]
    file = annotation_file(tmp_path / "own.json", [root, *under_it])
    assert find_categories(None, None, file, records).ids == (0, 2, 7, 40)
    without_root = records_of(tmp_path / "others", (2, "buoy"))
    assert find_categories(None, None, file, without_root).ids == (2, 7, 40)


def test_the_order_of_the_weights_is_taken_for_the_same_names(tmp_path):
    records = records_of(tmp_path / "records", (40, "boat"), (2, "buoy"))
    found = find_categories(None, None, "", records, usual_order=("boat", "buoy"))
    assert (found.ids, found.names) == ((40, 2), ("boat", "buoy"))
    found = find_categories(None, None, "", records, usual_order=("boat", "crew"))
    assert (found.ids, found.names) == ((2, 40), ("buoy", "boat"))


@pytest.mark.parametrize(
    ("categories", "names"),
    [
        ({(1, "person"), (2, "car")}, ("person", "car")),
        ({(1, ""), (2, "")}, ("1", "2")),
        ({(1, "a"), (1, "b"), (2, "c")}, ("1", "c")),
        ({(1, "a"), (2, "a")}, ("1", "2")),
    ],
)
def test_an_id_without_a_name_of_its_own_is_its_name(categories, names):
    assert names_of_categories((1, 2), categories) == names


def test_cocos_files_give_cocos_classes(golden_dir, tmp_path):
    few = read_index(str(golden_dir / "train2017*"), FLAG)
    coco = json.loads((golden_dir / "instances_train6.json").read_text())
    coco["annotations"] = coco["annotations"][:-3]  # which a converter leaves out
    file = tmp_path / "train6.json"
    file.write_text(json.dumps(coco))
    for annotations in ("", str(file)):
        found = find_categories(None, None, annotations, few)
        assert found.ids == COCO_CATEGORY_IDS
        assert found.are_cocos


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ([(1, "person"), (90, "toothbrush")], COCO_CATEGORY_IDS),
        ([(1, "person"), (2, "car")], (1, 2)),
        ([(1, None), (2, None)], (1, 2)),
        ([(91, "person")], (91,)),
        (zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True), COCO_CATEGORY_IDS),
        ([(category_id, None) for category_id in COCO_CATEGORY_IDS], COCO_CATEGORY_IDS),
    ],
)
def test_ids_with_cocos_names_are_cocos(tmp_path, categories, expected):
    records = records_of(tmp_path / "records", *categories)
    assert find_categories(None, None, "", records).ids == expected


def test_categories_that_are_no_class_are_named(tmp_path):
    records = records_of(tmp_path / "records", (40, "boat"), (2, "buoy"))
    require_known_categories(replace(records, category_ids=(2, 40)))
    with pytest.raises(UserError, match=r"1 categories of boxes are none of the 1 classes: 40 'bo"):
        require_known_categories(replace(records, category_ids=(2,)))


def test_a_run_on_own_data_from_the_records_to_its_evaluation(tmp_path, capsys):
    file = annotation_file(tmp_path / "own.json")
    convert(tmp_path, tmp_path / "own.json", tmp_path / "records/own", num_shards=1)
    pattern = f"{tmp_path}/records/own*"
    flags = [f"{FLAG}={pattern}", f"--model_dir={tmp_path}/run", "--device=cpu", "--num_workers=0"]
    flags += ["--recipe=small", "--train_batch_size=2", "--max_iters=1", "--mode=train"]
    capsys.readouterr()
    train.main([*flags, f"--val_json_file={file}"])
    printed = "".join(capsys.readouterr())
    assert "2 of 2 boxes are trained on" in printed
    assert f"3 classes, from --val_json_file={file}: 2 buoy, 7 crew, 40 boat" in printed
    state = checkpoint.load(tmp_path / "run/iter_1.pt")
    assert tuple(state["category_ids"]) == (2, 7, 40)
    assert tuple(state["classes"]) == ("buoy", "crew", "boat")

    train.main(flags)  # the finished run again: it keeps its classes
    assert "3 classes, from the run that is resumed" in "".join(capsys.readouterr())
    files = [f"--validation_file_pattern={pattern}", f"--val_json_file={file}"]
    evaluate.main([*files, f"--model_dir={tmp_path}/run", "--device=cpu", "--num_workers=0"])
    rows = json.loads((tmp_path / "run/eval/results.bbox.json").read_text())
    assert {row["category_id"] for row in rows} <= {2, 7, 40}


def test_check_data_takes_own_ids(tmp_path, capsys):
    annotation_file(tmp_path / "own.json")
    convert(tmp_path, tmp_path / "own.json", tmp_path / "records/own", num_shards=1)
    pattern = f"{tmp_path}/records/own*"
    assert check(tmp_path, pattern, "", "", category_ids=None) == 0
    printed = capsys.readouterr().out
    assert "2 classes, from the records: 2 buoy, 40 boat" in printed
    assert "2 of 2 boxes are trained on" in printed
    assert check(tmp_path, pattern, "", "", category_ids=(2,)) == 1
    assert "category 40 is none of the recipe's; give the ids" in capsys.readouterr().err


def test_records_without_a_box_are_nothing_to_train_on(tmp_path, capsys):
    with RecordWriter(tmp_path / "records") as writer:
        writer.write(encode({"image/encoded": (bytes, [picture()])}))
    assert check(tmp_path, f"{tmp_path}/records", "", "", category_ids=None) == 1
    printed = capsys.readouterr()
    assert "0 of 0 boxes are trained on" in printed.err
    assert "1 errors" in printed.out
    flags = [f"{FLAG}={tmp_path}/records", "--device=cpu", "--mode=train", "--recipe=small"]
    with pytest.raises(UserError, match=r"0 of 0 boxes are trained on; .*nothing to train on"):
        train.main([*flags, f"--model_dir={tmp_path}/run", "--num_workers=0"])


# ---- the annotation file of a val set


@pytest.fixture
def own_set(tmp_path):
    """Convert the set of `annotation_file`; return its records and its content."""
    file = tmp_path / "own.json"
    annotation_file(file)
    convert(tmp_path, file, tmp_path / "records/own", num_shards=1)
    records = read_index(f"{tmp_path}/records/own*", "--validation_file_pattern")
    categories = find_categories(None, None, str(file), records)
    return categories.of(records), json.loads(file.read_text())


def written(path, content):
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("bbox", "reason"), [(None, ""), ([1, 2, 0, 3], "; note: zero-size box, not trained on: 2 (")]
)
def test_a_val_file_without_a_usable_annotation_is_refused(own_set, tmp_path, bbox, reason):
    records, content = own_set
    if bbox is None:
        content["annotations"] = []
    for annotation in content["annotations"]:
        annotation["bbox"] = bbox
    with pytest.raises(UserError) as raised:
        evaluate.validation_records(records, written(tmp_path / "val.json", content))
    message = str(raised.value)
    assert f"val.json: no annotation to evaluate against{reason}" in message
    assert message.endswith("; give a val set that has some")


def test_a_val_file_of_another_size_is_refused_at_the_start(own_set, tmp_path):
    records, content = own_set
    content["images"][1] |= {"height": 80, "width": 120}
    complaint = (
        r"own-.*: record at byte \d+: its image is 60 x 40 pixels, 120 x 80 in the annotation file"
    )
    with pytest.raises(UserError, match=complaint):
        evaluate.validation_records(records, written(tmp_path / "val.json", content))


def test_where_a_record_says_no_size_the_image_is_measured(tmp_path, recipe, capsys):
    with RecordWriter(tmp_path / "records") as writer:
        writer.write(encode(GOOD | {"image/encoded": (bytes, [picture()])}))
    records = read_index(f"{tmp_path}/records", FLAG)
    image = {"id": 139, "file_name": "1.jpg", "height": 40, "width": 60}
    box = {"id": 1, "image_id": 139, "bbox": [1, 2, 3, 4], "category_id": 90}
    pairs = zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in pairs]
    content = {"images": [image], "annotations": [box], "categories": categories}
    fits, notes = evaluate.validation_records(records, written(tmp_path / "a.json", content))
    assert notes == []
    next(iter(build_loader(recipe, fits, training=False)))

    image["width"] = 61
    file = written(tmp_path / "b.json", content)
    wrong, _ = evaluate.validation_records(records, file)
    complaint = "its image is 60 x 40 pixels, 61 x 40 in the annotation file; give the file that"
    with pytest.raises(UserError, match=complaint):
        next(iter(build_loader(recipe, wrong, training=False)))
    assert check(tmp_path, "", f"{tmp_path}/records", file, category_ids=None) == 1
    assert complaint in capsys.readouterr().err


def test_what_is_noticed_in_a_val_file_is_said(own_set, tmp_path, capsys):
    records, content = own_set
    content["annotations"].append({**content["annotations"][0], "id": 3, "bbox": [1, 2, 0, 3]})
    content["images"].append({**content["images"][0], "id": 3, "file_name": "3.jpg"})
    file = written(tmp_path / "val.json", content)
    _, (zero_size, without_record) = evaluate.validation_records(records, file)
    assert zero_size.startswith("note: zero-size box, not trained on: 1 (image 1 annotation 3")
    assert without_record.startswith("1 of 3 images have no record: all their objects count as")

    pattern = f"{tmp_path}/records/own*"
    flags = [f"--model_dir={tmp_path}/run", "--device=cpu", "--num_workers=0", "--recipe=small"]
    files = [f"--validation_file_pattern={pattern}", f"--val_json_file={file}"]
    flags += [*files, "--train_batch_size=2", "--max_iters=1"]
    train.main([*flags, f"{FLAG}={pattern}", "--mode=train_and_eval"])
    assert f"{file}: {zero_size}" in (tmp_path / "run/train_0.log").read_text()
    capsys.readouterr()
    evaluate.main(flags)
    assert f"{file}: {zero_size}" in "".join(capsys.readouterr())
    assert check(tmp_path, pattern, pattern, file, category_ids=None) == 0
    assert f"{file}: {zero_size}" in capsys.readouterr().out


def test_a_root_that_only_the_training_set_uses_is_evaluated(tmp_path):
    """Boxes of the training set have it, those of the val set do not."""
    under_root = [{**category, "supercategory": "vessels"} for category in OWN_CATEGORIES]
    categories = [{"id": 0, "name": "vessels"}, *under_root]
    file = annotation_file(tmp_path / "own.json", categories)
    content = json.loads((tmp_path / "own.json").read_text())
    content["annotations"][0]["category_id"] = 0
    training_file = tmp_path / "train.json"
    training_file.write_text(json.dumps(content))
    convert(tmp_path, training_file, tmp_path / "records/train", num_shards=1)
    convert(tmp_path, tmp_path / "own.json", tmp_path / "records/val", num_shards=1)
    training = read_index(f"{tmp_path}/records/train*", FLAG)
    categories = find_categories(None, None, file, training)
    assert categories.names == ("vessels", "buoy", "crew", "boat")
    records = categories.of(read_index(f"{tmp_path}/records/val*", "flag"))
    records, _ = evaluate.validation_records(records, file)
    perfect = np.array([[1, 10, 10, 30, 20, 1, 40], [2, 10, 10, 30, 20, 1, 2]], np.float64)
    of_root = np.array([[2, 0, 0, 5, 5, 0.5, 0]])
    plain = EvaluationOptions(per_class=False, faster=False)
    result_rows = np.concatenate([perfect, of_root])
    evaluation = evaluate.evaluate_and_save(result_rows, records, file, tmp_path, plain, print)
    assert evaluation.stats["AP"] == pytest.approx(1)


def test_the_check_shows_all_of_a_broken_val_file(own_set, tmp_path, capsys):
    _, content = own_set
    content["annotations"] = [
        {"id": k, "image_id": 1, "category_id": 2, "bbox": [1, 2]} for k in range(7)
    ]
    file = written(tmp_path / "val.json", content)
    pattern = f"{tmp_path}/records/own*"
    flags = [f"{FLAG}={pattern}", f"--model_dir={tmp_path}/run", "--device=cpu", "--mode=train"]
    with pytest.raises(UserError, match=r"train\.py --check_data lists them in full$"):
        train.main([*flags, f"--val_json_file={file}", "--recipe=small", "--num_workers=0"])
    assert check(tmp_path, pattern, "", file, category_ids=None) == 1
    printed = capsys.readouterr().out
    assert printed.count("image 1 annotation ") == 7
    assert "7 errors" in printed


def test_the_converter_names_the_check_that_reads_its_annotation_file(tmp_path):
    file = tmp_path / "own.json"
    annotation_file(file)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"ssd_resnet34/train\.py --check_data lists them in full$"):
        convert(tmp_path, file, tmp_path / "records/own", num_shards=1)
