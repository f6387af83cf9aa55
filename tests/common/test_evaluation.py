import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.coco.draw import MIN_SCORE
from common.coco.evaluation import (
    ABSENT,
    draw_pr_curves,
    evaluate,
    gather_result_rows,
    save_results,
    shown_score,
    to_result_rows,
)
from common.coco.index import read_annotations
from common.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
VAL = str(TINY / "annotations" / "instances_val2017.json")


def detections(seed):
    """Perturbed ground truth with false alarms and misses: one array of rows for each image."""
    index = read_annotations(VAL)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(len(index)):
        truth = index.annotations(i)
        boxes = truth.box_xywh.repeat(2, axis=0)
        boxes[:, 2:] += boxes[:, :2]
        boxes += rng.normal(0, 5, boxes.shape)
        labels = truth.label.repeat(2)
        labels = np.where(rng.random(len(labels)) < 0.2, rng.integers(0, 80, len(labels)), labels)
        keep = rng.random(len(labels)) < 0.7
        scores = rng.random(len(labels)).round(2)  # with ties
        ids = index.category_ids
        rows.append(
            to_result_rows(index.image_ids[i], boxes[keep], scores[keep], labels[keep], ids)
        )
    return rows


def reference(rows, annotation_file=VAL):
    """pycocotools as its users call it: 12 numbers and what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotation_file)
        run = COCOeval(truth, truth.loadRes(rows), "bbox")
        run.evaluate()
        run.accumulate()
        with contextlib.redirect_stdout(printed):
            run.summarize()
    return run.stats.tolist(), printed.getvalue().rstrip("\n")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_12_numbers_are_pycocotools(seed, capsys):
    rows = np.concatenate(detections(seed))
    numbers, text = reference(rows)
    capsys.readouterr()
    evaluation = evaluate(VAL, rows)
    assert capsys.readouterr().out == ""
    assert list(evaluation.stats.values()) == numbers
    assert evaluation.text == text
    assert 0.1 < evaluation.stats["AP"] < 0.9
    pytest.importorskip("faster_coco_eval")
    faster = evaluate(VAL, rows, faster=True)
    assert faster.stats == pytest.approx(evaluation.stats, abs=1e-12)
    assert faster.text == text


def test_perfect_detections_and_per_class():
    index = read_annotations(VAL)
    rows = []
    for i in range(len(index)):
        truth = index.annotations(i)
        corners = truth.box_xywh.copy()
        corners[:, 2:] += corners[:, :2]
        rows.append(
            to_result_rows(
                index.image_ids[i], corners, 1 - truth.crowd, truth.label, index.category_ids
            )
        )
    evaluation = evaluate(VAL, np.concatenate(rows))
    assert evaluation.stats["AP"] == pytest.approx(1)
    assert len(evaluation.classes) == 80
    present = {index.class_names[k] for k in index.table.label[~index.table.crowd]}
    for metrics in evaluation.classes:
        expected = 1 if metrics.name in present else -1
        assert [metrics.ap, metrics.ap50, metrics.ar] == pytest.approx([expected] * 3)


@pytest.mark.parametrize("faster", [False, True])
def test_the_figures_of_a_class_are_pycocotools(faster):
    if faster:
        pytest.importorskip("faster_coco_eval")
    rows = np.concatenate(detections(0))
    evaluation = evaluate(VAL, rows, faster=faster)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(VAL)
        run = COCOeval(truth, truth.loadRes(rows), "bbox")
        for metrics, category_id in zip(evaluation.classes, sorted(truth.getCatIds()), strict=True):
            run.params.catIds = [category_id]
            run.evaluate()
            run.accumulate()
            run.summarize()
            expected = [run.stats[0], run.stats[1], run.stats[8]]
            actual = [metrics.ap, metrics.ap50, metrics.ar]
            assert actual == pytest.approx(expected, abs=1e-12)
            assert metrics.name == truth.cats[category_id]["name"]
            boxes = truth.loadAnns(truth.getAnnIds(catIds=[category_id], iscrowd=False))
            assert metrics.num_boxes == len(boxes)


@pytest.mark.parametrize("faster", [False, True])
def test_no_detection_is_an_answer(faster):
    if faster:
        pytest.importorskip("faster_coco_eval")
    evaluation = evaluate(VAL, np.empty((0, 7)), faster=faster)
    assert set(evaluation.stats.values()) == {0.0}


@pytest.mark.parametrize("faster", [False, True])
def test_no_ground_truth_gives_minus_one(tmp_path, faster):
    if faster:
        pytest.importorskip("faster_coco_eval")
    content = json.loads(Path(VAL).read_text())
    del content["annotations"]
    (tmp_path / "info.json").write_text(json.dumps(content))
    rows = np.concatenate(detections(0))
    evaluation = evaluate(str(tmp_path / "info.json"), rows, faster=faster)
    assert set(evaluation.stats.values()) == {-1.0}
    draw_pr_curves(tmp_path / "pr.png", evaluation)
    assert Image.open(tmp_path / "pr.png").size[0] > 400


def slim(tmp_path, **area):
    content = json.loads(Path(VAL).read_text())
    keys = ("id", "image_id", "category_id", "bbox")
    content["annotations"] = [
        {key: a[key] for key in keys} | area for a in content["annotations"] if not a["iscrowd"]
    ]
    path = tmp_path / "slim.json"
    path.write_text(json.dumps(content))
    return str(path), content


@pytest.mark.parametrize("area", [{}, {"area": 1.0, "iscrowd": 0}])
def test_slim_files_use_the_area_of_boxes(tmp_path, area):
    path, content = slim(tmp_path, **area)
    rows = np.concatenate(detections(0))
    evaluation = evaluate(path, rows)
    for a in content["annotations"]:
        a |= {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0}
    (tmp_path / "full.json").write_text(json.dumps(content))
    assert list(evaluation.stats.values()) == reference(rows, str(tmp_path / "full.json"))[0]
    assert len(evaluation.text.splitlines()) == 13
    count = len(content["annotations"])
    assert f"{count} of {count} annotations of {path} have no mask area" in evaluation.text


def test_annotation_number_0_counts(tmp_path):
    """pycocotools itself takes a match with annotation 0 for none."""
    image = {"id": 5, "file_name": "a", "height": 90, "width": 90}
    box = {"id": 0, "image_id": 5, "category_id": 2, "bbox": [1, 1, 50, 60]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 2, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    rows = to_result_rows(5, np.array([[1, 1, 51, 61]]), [0.5], [0], (2,))
    assert evaluate(str(tmp_path / "a.json"), rows).stats["AP"] == pytest.approx(1)


def test_foreign_rows_and_broken_files_are_refused(tmp_path):
    row = detections(0)[0][:1]
    for column, what in ((0, "image"), (6, "category")):
        foreign = row.copy()
        foreign[0, column] = 12345
        with pytest.raises(UserError, match=f"no {what} 12345"):
            evaluate(VAL, foreign)
    with pytest.raises(UserError, match=r"none\.json"):
        evaluate(str(tmp_path / "none.json"), row)
    with pytest.raises(UserError, match="no image nan"):
        evaluate(VAL, row * np.nan)


def test_absent_backend_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"faster_coco_eval.*; pip install .*faster-coco-eval"):
        evaluate(VAL, np.empty((0, 7)), faster=True)


def test_without_a_right_detection_only_confident_ones_are_confused():
    image_id = read_annotations(VAL).image_ids[0]
    category_id = read_annotations(VAL).category_ids[0]
    far_away = [image_id, 5000, 5000, 10, 10, 0.9, category_id]
    unsure = [image_id, 6000, 6000, 10, 10, 0.1, category_id]
    evaluation = evaluate(VAL, np.array([far_away, unsure]))
    assert evaluation.best.score == ABSENT
    assert shown_score(evaluation.best.score) == MIN_SCORE
    assert evaluation.confusion[-1].sum() == 1


def test_mmdet_keys():
    evaluation = evaluate(VAL, np.concatenate(detections(0)))
    stats, log = evaluation.stats, evaluation.mmdet()
    assert list(log) == [
        *(f"bbox_mAP{suffix}" for suffix in ("", "_50", "_75", "_s", "_m", "_l")),
        "bbox_mAP_copypaste",
    ]
    assert log["bbox_mAP_s"] == round(stats["APsmall"], 4)
    assert log["bbox_mAP_copypaste"].split()[1] == f"{stats['AP50']:.3f}"


def test_rows_skip_classes_that_the_file_lacks():
    boxes = np.array([[1, 2, 4, 8]] * 3, dtype=np.float32)
    rows = to_result_rows(9, boxes, np.array([0.9, 0.8, 0.7]), np.array([2, 0, 1]), (7, -1, 5))
    assert rows.tolist() == [[9, 1, 2, 3, 6, 0.9, 5], [9, 1, 2, 3, 6, 0.8, 7]]
    assert to_result_rows(9, np.empty((0, 4)), [], [], (7,)).shape == (0, 7)


def gathered(parts):
    """`gather_result_rows` as it runs on all ranks at once; the answer of rank 0."""
    answers = [
        gather_result_rows(
            part, SimpleNamespace(all_gather_objects=lambda _: parts, main=rank == 0)
        )
        for rank, part in enumerate(parts)
    ]
    assert answers[1:] == [None] * (len(parts) - 1)
    return answers[0]


@pytest.mark.parametrize("world", [1, 3, 8])
def test_gathered_rows_do_not_depend_on_the_number_of_ranks(world):
    rows = detections(3)
    padded = rows + rows[: -len(rows) % (world * 4)] + rows[:4]
    parts = [padded[rank::world] for rank in range(world)]
    expected = np.concatenate(sorted(rows, key=lambda block: block[:1, 0].tolist() or [0]))
    np.testing.assert_array_equal(gathered(parts), expected)


def test_gathering_repeats_of_one_image_and_nothing():
    block = detections(0)[0]
    np.testing.assert_array_equal(gathered([[block, block], [block]]), block)
    assert gathered([[], []]).shape == (0, 7)
    assert gathered([[np.empty((0, 7))]]).shape == (0, 7)


def test_saved_results_are_a_submission(tmp_path):
    rows = np.concatenate(detections(0))
    path = tmp_path / "out" / "results.json"
    save_results(path, rows)
    saved = json.loads(path.read_text())
    assert list(path.parent.iterdir()) == [path]
    assert type(saved[0]["image_id"]) is type(saved[0]["category_id"]) is int
    again = [[r["image_id"], *r["bbox"], r["score"], r["category_id"]] for r in saved]
    np.testing.assert_array_equal(again, rows)
    with contextlib.redirect_stdout(io.StringIO()):
        assert COCO(VAL).loadRes(str(path)).anns
    save_results(path, np.empty((0, 7)))
    assert json.loads(path.read_text()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        save_results(path, np.array([[1, 0, 0, 1, 1, np.nan, 1]]))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_pr_curves_of_all_runs_have_the_same_axes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    draw_pr_curves(tmp_path / "pr.png", evaluate(VAL, np.concatenate(detections(0))))
    (figure,) = figures
    (axes,) = figure.axes
    assert axes.get_xlim() == axes.get_ylim() == (0, 1)
    assert axes.get_legend() is None
    (legend,) = figure.legends  # below the axes
    assert [text.get_text().split()[0] for text in legend.get_texts()] == ["AP50", "AP75", "AP"]


def test_pr_curves(tmp_path):
    evaluation = evaluate(VAL, np.concatenate(detections(0)))
    draw_pr_curves(tmp_path / "pr.png", evaluation)
    picture = np.array(Image.open(tmp_path / "pr.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["pr.png"]
