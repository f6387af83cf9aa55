"""The report on what went wrong: its files, its pictures and its lines in the log."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.coco.analysis import NO_LABEL, NOT_FOUND, OTHER_CLASS, Suspect, analyse
from common.coco.analysis_report import dominant_error, write_analysis
from common.coco.error_pictures import draw_confusion, draw_suspects
from common.coco.evaluation import EvaluationOptions, to_result_rows
from common.coco.index import read_annotations, read_index
from common.coco.report import image_by_id, report_results, to_xyxy
from common.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
VAL = str(TINY / "annotations" / "instances_val2017.json")
PLAIN = EvaluationOptions(per_class=False, faster=False)


@pytest.fixture(scope="module")
def records():
    return read_index(VAL, str(TINY / "val2017"))


def detections(records, right=0.6):
    """Result rows: a share of the boxes, some of another class, and boxes where nothing is."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(len(records)):
        gt = records.annotations(i)
        num = len(gt)
        labels = np.where(rng.random(num) < 0.2, (gt.label + 1) % 80, gt.label)
        kept = rng.random(num) < right
        boxes = np.concatenate([to_xyxy(gt.box_xywh)[kept], [[0, 0, 30, 40]]])
        labels = np.append(labels[kept], 5)
        scores = rng.random(len(labels))
        ids = records.category_ids
        rows.append(to_result_rows(records.image_ids[i], boxes, scores, labels, ids))
    return np.concatenate(rows)


def written(records, result_rows, folder, read_image=None):
    """The analysis and the lines that were logged."""
    report_results(result_rows, VAL, len(records), folder, PLAIN, lambda _: None)
    lines = []
    read_image = read_image or image_by_id(records, False)
    return write_analysis(folder, VAL, records.class_names, read_image, lines.append), lines


def test_every_file_and_a_line_for_each_picture(records, tmp_path):
    analysis, lines = written(records, detections(records), tmp_path)
    assert lines[0] == dominant_error(analysis)
    names = ["errors.png", "confusion.png", "worst_images.png", "suspect_labels.png"]
    for name, line in zip(names, lines[1:], strict=True):
        assert line.startswith(f"{tmp_path / name}: ")
        assert Image.open(tmp_path / name).format == "PNG"
    content = json.loads((tmp_path / "analysis.json").read_text())
    for name, error in analysis.errors.items():
        assert content["errors"][name] == {"count": error.count, "dAP": error.cost}
    assert np.array_equal(content["confusion"]["counts"], analysis.confusion)
    assert content["confusion"]["names"] == [*analysis.class_names, "background"]
    worst = analysis.worst_images[0]
    assert content["worst_images"][0] == {
        "file": worst.file_name,
        "image_id": worst.image_id,
        "missed": worst.missed,
        "false": worst.false,
    }
    assert worst.file_name in lines[3]
    assert len(content["suspects"]) == len(analysis.suspects)
    assert {suspect["kind"] for suspect in content["suspects"]} == {
        NO_LABEL,
        NOT_FOUND,
        OTHER_CLASS,
    }


def test_a_box_far_larger_than_its_image_needs_no_more_memory(tmp_path):
    """Such boxes come from a network that has learned nothing; their tile took 18 GB once."""
    boxes = [(-5e4, -5e4, 5e4, 5e4), (-5e4, 3, -4e4, 9)]  # the second one misses the image
    suspects = [Suspect(NO_LABEL, 1, "a.jpg", box, "", "cat", 0.5) for box in boxes]
    image = np.full((30, 40, 3), 200, np.uint8)
    tracemalloc.start()
    draw_suspects(tmp_path / "suspects.png", suspects, lambda _: image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sheet = np.asarray(Image.open(tmp_path / "suspects.png"))
    assert peak < 1e8
    assert (sheet == 200).all(axis=2).sum() > 1000  # the image is in the tiles


def test_suspect_labels_are_a_coco_file(records, tmp_path):
    analysis, _ = written(records, detections(records), tmp_path)
    path = tmp_path / "suspect_labels.json"
    index = read_annotations(str(path))
    index.raise_errors()
    assert len(index.table) == len(analysis.suspects)
    assert set(index.category_ids) <= set(records.category_ids)
    by_number = {}
    for annotation in json.loads(path.read_text())["annotations"]:
        by_number[annotation["id"]] = annotation
    for number, suspect in enumerate(analysis.suspects, start=1):
        annotation = by_number[number]
        assert annotation["image_id"] == suspect.image_id
        assert annotation["kind"] == annotation["attributes"]["kind"] == suspect.kind
        assert annotation["score"] == pytest.approx(suspect.score, abs=1e-4)
        label = records.category_ids.index(annotation["category_id"])
        assert records.class_names[label] == suspect.suggested or suspect.label


def test_nothing_wrong_leaves_no_pictures_of_a_former_evaluation(records, tmp_path):
    written(records, detections(records), tmp_path)
    rows = []
    for i in range(len(records)):
        gt = records.annotations(i)[~records.annotations(i).crowd]
        boxes = to_xyxy(gt.box_xywh)
        ids = records.category_ids
        rows.append(to_result_rows(records.image_ids[i], boxes, [0.9] * len(gt), gt.label, ids))
    _, lines = written(records, np.concatenate(rows), tmp_path)
    assert lines[0] == "what went wrong: nothing that costs AP50, which is 100.0"
    assert not (tmp_path / "worst_images.png").exists()
    assert not (tmp_path / "suspect_labels.png").exists()
    assert json.loads((tmp_path / "suspect_labels.json").read_text())["annotations"] == []


def test_no_detection_at_all_is_explained(records, tmp_path):
    analysis, lines = written(records, np.empty((0, 7)), tmp_path)
    assert lines[0].startswith("what went wrong: missed (object that no detection is near) costs ")
    assert analysis.errors["missed"].cost == 1
    assert analysis.score == 0.3  # there is no score with a best F1


def test_images_that_are_not_there_are_not_drawn(records, tmp_path):
    few = records.subset(np.arange(2))
    written(records, detections(records), tmp_path, image_by_id(few, False))
    drawn = Image.open(tmp_path / "worst_images.png")
    assert drawn.height < 600  # one row
    written(records, detections(records), tmp_path, lambda _: None)
    assert not (tmp_path / "worst_images.png").exists()


def test_images_that_cannot_be_read_are_logged_once_and_not_drawn(records, tmp_path):
    def fail(image_id):
        raise UserError(f"image {image_id} has gone", "bring it back")

    _, lines = written(records, detections(records), tmp_path, fail)
    not_drawn = [line for line in lines if line.startswith("not drawn: image ")]
    assert not_drawn
    assert len(set(not_drawn)) == len(not_drawn)
    assert not (tmp_path / "worst_images.png").exists()
    assert (tmp_path / "analysis.json").exists()


def test_the_sentence_names_the_dearest_error_first(records):
    index = read_annotations(VAL)
    sentence = dominant_error(analyse(index, detections(records, right=0.3), 0.1))
    assert sentence.startswith("what went wrong: missed (object that no detection is near) costs ")
    assert " AP50, the most; " in sentence


@pytest.mark.parametrize("num_classes", [1, 2, 80, 130])
def test_a_confusion_matrix_of_any_size_is_drawn(tmp_path, num_classes):
    rng = np.random.default_rng(0)
    confusion = rng.poisson(0.1, (num_classes + 1, num_classes + 1)) + 30 * np.eye(
        num_classes + 1, dtype=np.int64
    )
    names = [f"class {k}" for k in range(num_classes)]
    draw_confusion(tmp_path / "a.png", confusion, names, 0.3, 0.5)
    picture = Image.open(tmp_path / "a.png")
    assert max(picture.size) < 3000
    draw_confusion(tmp_path / "b.png", np.zeros_like(confusion), names, 0.0, 0.5)
