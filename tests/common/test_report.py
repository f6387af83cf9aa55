"""The report of an evaluation: what is logged, and the files in the output folder."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common.coco import report
from common.coco.evaluation import EvaluationOptions, evaluate, save_results, to_result_rows
from common.coco.index import read_index
from common.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
VAL = str(TINY / "annotations" / "instances_val2017.json")
PLAIN = EvaluationOptions(per_class=False, faster=False)


@pytest.fixture(scope="module")
def records():
    return read_index(VAL, str(TINY / "val2017"))


@pytest.fixture(scope="module")
def result_rows(records):
    """The ground truth itself, with falling scores."""
    rows = []
    for i in range(len(records)):
        gt = records.annotations(i)
        boxes = report.to_xyxy(gt.box_xywh)
        scores = np.linspace(0.9, 0.1, len(gt))
        ids = records.category_ids
        rows.append(to_result_rows(records.image_ids[i], boxes, scores, gt.label, ids))
    return np.concatenate(rows)


def test_metrics_are_logged_and_files_written(result_rows, tmp_path):
    lines = []
    folder = tmp_path / "out"
    evaluation = report.report_results(result_rows, VAL, 50, folder, PLAIN, lines.append)
    expected = evaluate(VAL, result_rows)
    assert evaluation.stats == expected.stats
    path = folder / "results.bbox.json"
    assert lines == [f"{expected.text}\n{len(result_rows)} detections in 50 images: {path}"]
    pictures = ["confusion.png", "pr_curves.png"]
    files = ["metrics.json", "pr_curves.json", "results.bbox.json"]
    assert {file.name for file in folder.iterdir()} == {*pictures, *files}
    assert evaluation.pictures() == [folder / "pr_curves.png", folder / "confusion.png"]
    for picture in evaluation.pictures():
        assert Image.open(picture).format == "PNG"
    save_results(tmp_path / "again.json", result_rows)
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_the_metrics_of_a_run_have_its_step_and_coco_names(result_rows, tmp_path):
    evaluation = report.report_results(result_rows, VAL, 50, tmp_path, PLAIN, print, step=40)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert " ".join(metrics) == (
        "AP AP50 AP75 APsmall APmedium APlarge AR1 AR10 AR100 ARsmall ARmedium ARlarge step "
        "images best_f1 classes"
    )
    for name, value in {**evaluation.stats, "step": 40, "images": 50}.items():
        assert metrics[name] == value


@pytest.mark.parametrize(
    ("goal", "end"),
    [
        (None, "results.bbox.json"),
        (0.0, "Current AP: 0.99999"),
        (0.23, "Current AP: 0.99999 AP goal: 0.23000"),
    ],
)
def test_the_line_of_the_ports_names_a_goal_only_where_there_is_one(
    result_rows, tmp_path, monkeypatch, goal, end
):
    evaluation = evaluate(VAL, result_rows)
    evaluation.stats["AP"] = 0.99999
    monkeypatch.setattr(report, "evaluate", lambda *_: evaluation)
    lines = []
    report.report_results(result_rows, VAL, 50, tmp_path, PLAIN, lines.append, goal=goal)
    assert lines[-1].endswith(end)


def test_metrics_are_logged_where_no_file_can_be_written(result_rows, tmp_path):
    (tmp_path / "out").write_text("a file in the place of the folder")
    lines = []
    with pytest.raises(UserError, match=r"results\.bbox\.json cannot be written: File exists;"):
        report.report_results(result_rows, VAL, 50, tmp_path / "out", PLAIN, lines.append, goal=0.0)
    assert "Average Precision  (AP) @[ IoU=0.50:0.95" in lines[0]
    assert lines[-1].startswith("Current AP: ")


def test_in_training_the_line_of_the_epoch_stands_for_the_table(result_rows, tmp_path):
    lines = []
    options = PLAIN._replace(table=False)
    report.report_results(result_rows, VAL, 50, tmp_path, options, lines.append, goal=0.0)
    (line,) = lines
    assert line.startswith("Current AP: ")
    assert (tmp_path / "results.bbox.json").exists()


def test_the_ap_of_every_class_comes_in_columns(result_rows, tmp_path):
    lines = []
    options = EvaluationOptions(per_class=True, faster=False)
    evaluation = report.report_results(result_rows, VAL, 50, tmp_path, options, lines.append)
    assert len(lines) == 2
    table = lines[1].splitlines()
    assert len(table) == 81
    assert table[0].split() == [
        "class",
        "boxes",
        "AP",
        "AP50",
        "AR100",
        "score",
        "precision",
        "recall",
    ]
    assert len({len(line) for line in table}) == 1
    shown = [line.split()[-6] for line in table[1:]]
    with_ap = [float(text) for text in shown if text != "-"]
    assert with_ap == sorted(with_ap, reverse=True)
    assert shown[len(with_ap) :] == ["-"] * (80 - len(with_ap))
    person = next(line for line in table if line.startswith("person"))
    metrics = evaluation.classes[0]
    assert person.split()[1:4] == ["123", f"{metrics.ap:.3f}", f"{metrics.ap50:.3f}"]


def test_the_backend_of_the_options_is_used(result_rows, tmp_path, monkeypatch):
    asked = []

    def remember(annotation_file, rows, faster, classes):
        asked.append(faster)
        return evaluate(annotation_file, rows)

    monkeypatch.setattr(report, "evaluate", remember)
    for faster in (False, True):
        options = EvaluationOptions(per_class=False, faster=faster)
        report.report_results(result_rows, VAL, 50, tmp_path, options, print)
    assert asked == [False, True]


def test_results_are_saved_even_if_the_evaluation_fails(result_rows, tmp_path):
    with pytest.raises(UserError, match=r"none\.json"):
        report.report_results(result_rows, str(tmp_path / "none.json"), 50, tmp_path, PLAIN, print)
    assert len(json.loads((tmp_path / "results.bbox.json").read_text())) == len(result_rows)


def test_examples_are_spread_and_show_boxes_by_label(records, result_rows, tmp_path, monkeypatch):
    sheets = []

    def remember(path, examples, class_names):
        sheets.append(examples)
        assert (path, class_names) == (tmp_path / "detections.png", records.class_names)

    monkeypatch.setattr(report, "draw_sheet", remember)
    report.draw_examples(tmp_path / "detections.png", records, result_rows, False, count=5)
    (examples,) = sheets
    with_gt = np.flatnonzero(np.diff(records.offsets))
    chosen = with_gt[np.linspace(0, len(with_gt) - 1, 5, dtype=int)]
    assert len(examples) == 5
    for i, example in zip(chosen, examples, strict=True):
        gt = records.annotations(i)
        assert example.image.shape[:2] == tuple(records.sizes[i])
        np.testing.assert_array_equal(example.gt_boxes_xyxy[:, :2], gt.box_xywh[:, :2])
        np.testing.assert_array_equal(example.gt_labels, gt.label)
        # The rows are the ground truth.
        np.testing.assert_allclose(example.boxes_xyxy, example.gt_boxes_xyxy)
        np.testing.assert_array_equal(example.labels, example.gt_labels)
        assert example.scores[0] == 0.9


def test_examples_without_detections_and_without_ground_truth(records, tmp_path):
    few = records.subset([3, 4])
    without_gt = replace(few, offsets=np.zeros(3, np.int64), table=few.table[:0])
    for name, subset in (("a.png", few), ("b.png", without_gt)):
        report.draw_examples(tmp_path / name, subset, np.empty((0, 7)), False)
        assert Image.open(tmp_path / name).format == "PNG"


def test_turned_images_of_all_ranks_are_counted_once(records):
    """In training each rank reads the whole set, in evaluation its share."""

    class TwoRanks:
        def __init__(self, ids_of_other):
            self.ids_of_other = ids_of_other

        def all_gather_objects(self, ids):
            return [ids, self.ids_of_other]

    share = records.subset(np.arange(0, len(records), 2))
    reader = SimpleNamespace(records=share, is_turned=np.zeros(len(share), dtype=bool))
    assert report.turned_images(reader, len(records), TwoRanks([])) == []
    third = share.image_ids[1].item()
    reader.is_turned[1] = True
    for ids_of_other, count in (([], 1), ([third], 1), ([third, 7], 2)):
        (line,) = report.turned_images(reader, len(records), TwoRanks(ids_of_other))
        assert line.startswith(f"{count} of {len(records)} images were turned by their EXIF")
