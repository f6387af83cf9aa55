"""The file of metrics: what it holds, what stays in it, and the scores that demos take from it."""

import json

import numpy as np
import pytest

from common.coco.evaluation import ClassMetrics, Evaluation, OperatingPoint
from common.coco.metrics import add_to_metrics, lowest_scores, read_metrics, save_metrics
from common.errors import UserError

NOTHING_RIGHT = OperatingPoint(-1.0, 0.0, 0.0, 0.0)
NO_TRUTH = OperatingPoint(-1.0, -1.0, -1.0, -1.0)
EVALUATION = Evaluation(
    stats={"AP": 0.25, "AP50": 0.5},
    text="",
    classes=[
        ClassMetrics("cat", 0.3, 0.6, 0.4, 12, OperatingPoint(0.45, 0.75, 0.5, 0.6)),
        ClassMetrics("dog", 0.0, 0.0, 0.0, 3, NOTHING_RIGHT),
        ClassMetrics("cow", -1.0, -1.0, -1.0, 0, NO_TRUTH),
    ],
    best=OperatingPoint(0.375, 0.5, 0.5, 0.5),
    precision=np.zeros((10, 101, 3)),
    confusion=np.zeros((4, 4), np.int64),
)


def test_the_file_holds_every_figure(tmp_path):
    path = tmp_path / "metrics.json"
    save_metrics(path, EVALUATION, 50, step=7, images_per_second=12.345)
    metrics = json.loads(path.read_text())
    assert metrics["AP50"] == 0.5
    assert [metrics[name] for name in ("step", "images", "speed")] == [7, 50, 12.35]
    assert metrics["best_f1"] == {"score": 0.375, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert [entry["name"] for entry in metrics["classes"]] == ["cat", "dog", "cow"]
    assert metrics["classes"][0] == {
        "name": "cat",
        "AP": 0.3,
        "AP50": 0.6,
        "AR": 0.4,
        "boxes": 12,
        "best_f1": {"score": 0.45, "precision": 0.75, "recall": 0.5, "f1": 0.6},
    }
    assert metrics["classes"][2]["AP"] == -1


def test_a_benchmark_stays_beside_new_figures(tmp_path):
    path = tmp_path / "metrics.json"
    add_to_metrics(path, "benchmark", {"flops": 3})
    save_metrics(path, EVALUATION, 50, step=7)
    save_metrics(path, EVALUATION, 50)
    metrics = read_metrics(path)
    assert metrics["benchmark"] == {"flops": 3}
    assert "step" not in metrics  # that of the former evaluation
    add_to_metrics(path, "benchmark", {"flops": 4})
    assert read_metrics(path) == {**metrics, "benchmark": {"flops": 4}}


def test_a_class_without_a_score_takes_the_pooled_one(tmp_path):
    save_metrics(tmp_path / "metrics.json", EVALUATION, 50)
    checkpoint = str(tmp_path / "best.pt")
    names = ("cow", "cat", "dog")  # in the order of the detector
    assert lowest_scores("best", checkpoint, names) == [0.375, 0.45, 0.375]
    assert lowest_scores("best", str(tmp_path.parent / "best.pt"), names, tmp_path.name) == [
        0.375,
        0.45,
        0.375,
    ]
    assert lowest_scores(0.2, "nowhere/best.pt", names) == [0.2, 0.2, 0.2]


@pytest.mark.parametrize("content", [None, "{}", "no JSON", '{"AP": 0.5}'])
def test_scores_that_are_not_there_are_one_clear_error(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    message = r"no .*metrics\.json with .* best F1; evaluate the checkpoint with --output_dir="
    with pytest.raises(UserError, match=message):
        lowest_scores("best", str(tmp_path / "best.pt"), ("cat",))


def test_scores_of_other_classes_are_refused(tmp_path):
    save_metrics(tmp_path / "metrics.json", EVALUATION, 50)
    with pytest.raises(UserError, match="of another detector: no class 'car'"):
        lowest_scores("best", str(tmp_path / "best.pt"), ("cat", "car"))


def test_a_detector_that_was_never_right_has_no_best_score(tmp_path):
    path = tmp_path / "metrics.json"
    save_metrics(path, EVALUATION, 50)
    add_to_metrics(path, "best_f1", NOTHING_RIGHT._asdict())
    with pytest.raises(UserError, match=r"no detection was right; give a number as"):
        lowest_scores("best", str(tmp_path / "best.pt"), ("cat",))
