"""compare.py RUN RUN ...: detectors of several models on one val set."""

import json
import shutil

import numpy as np
import pytest
import torch

import compare
from common.coco import comparison
from common.coco.comparison import Row, best_of, short_names
from common.coco.evaluation import STATS
from common.coco.page import metric_text
from common.errors import UserError
from common.npu import checkpoint
from tests import scripts
from tests.pages import Page
from tests.small_models import TFRECORD, module

CLASSES = ["person", "cat", "dog"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "coco"
    return scripts.subset(folder, train=1, val=4, classes=CLASSES)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(compare, "SECONDS_OF_SPEED", 0.0)


def run(data, output, *runs):
    flags = [f"--data={data}", f"--output_dir={output}", "--device=cpu", "--num_workers=0"]
    compare.main([*map(str, runs), *flags])


def table(text):
    """The lines of the table by their label: a text for each run."""
    lines = {}
    for line in text.splitlines():
        label, *texts = [part.strip() for part in line.split("  ") if part.strip()]
        lines.setdefault(label, texts)
    return lines


def test_runs_of_two_models_stand_side_by_side(detectors, data, tmp_path, capsys):
    paths = [detectors["ssd_resnet34"], detectors["fcos"]]
    run(data, tmp_path / "out", paths[0].parent, paths[1])
    printed = capsys.readouterr().out
    lines = table(printed)
    assert lines["model"] == ["ssd_resnet34", "fcos"]
    assert lines["M parameters"] == ["1.6", "8.2"]
    for label in (*STATS, "ms an image", "GFLOPs an image", *CLASSES):
        assert len(lines[label]) == 2
    assert lines["input, pixels"][0] == "300 x 300"
    path = tmp_path / "out" / "compare.html"
    assert printed.splitlines()[-1] == f"report: {path}"

    content = Page(path)
    assert list(content.sections) == ["summary", "classes", "pr_curves", "images", "runs"]
    for text in ("ssd_resnet34", "fcos", lines["AR100"][0].rstrip("*")):
        assert text in content.sections["summary"]
    pictures = [a["src"] for a in content.attributes("img") if "src" in a]
    assert len(pictures) == 4 * 3  # of each image the ground truth and two runs
    assert str(paths[0]) in content.sections["runs"]
    assert "compare" not in {path.name for path in data.iterdir()}


@pytest.mark.again
@pytest.mark.parametrize("model", ["ssd_mmdet", "m2det", TFRECORD])
def test_every_model_is_compared(detectors, data, tmp_path, capsys, model):
    run(data, tmp_path, detectors[model])
    assert table(capsys.readouterr().out)["model"] == [model]


@pytest.fixture
def evaluated(monkeypatch):
    """The result rows that were evaluated, of each run."""
    rows_of_runs = []
    evaluate = compare.evaluate

    def keep(annotation_file, result_rows, *arguments):
        rows_of_runs.append(result_rows)
        return evaluate(annotation_file, result_rows, *arguments)

    monkeypatch.setattr(compare, "evaluate", keep)
    return rows_of_runs


@pytest.mark.parametrize(
    "model",
    [
        "ssd_resnet34",
        *(pytest.param(m, marks=pytest.mark.again) for m in ("ssd_mmdet", "m2det")),
    ],
)
def test_the_detections_are_those_of_evaluate(detectors, data, tmp_path, capsys, evaluated, model):
    run(data, tmp_path, detectors[model])
    lines = table(capsys.readouterr().out)
    flags = ("--device=cpu", "--num_workers=0", f"--data={data}", f"--output_dir={tmp_path}")
    module(model, "evaluate").main([*flags, f"--checkpoint={detectors[model]}"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in STATS:
        assert lines[name] == [metric_text(metrics[name])]
    expected = json.loads((tmp_path / "results.bbox.json").read_text())
    assert len(evaluated[0]) == len(expected) > 0
    for row, entry in zip(evaluated[0].tolist(), expected, strict=True):
        assert (row[0], row[6]) == (entry["image_id"], entry["category_id"])
        assert row[1:6] == pytest.approx([*entry["bbox"], entry["score"]], abs=1e-3)


def test_classes_in_another_order_are_the_same(detectors, data, tmp_path, evaluated):
    state = checkpoint.load(detectors["ssd_resnet34"])
    # The same network under exchanged names: what was a cat is called a dog.
    state["classes"] = ["person", "dog", "cat"]
    checkpoint.save(tmp_path / "other.pt", state)
    run(data, tmp_path / "out", detectors["ssd_resnet34"], tmp_path / "other.pt")
    rows, exchanged = evaluated
    assert 7 in rows[:, 6]
    category_ids = np.select([rows[:, 6] == 7, rows[:, 6] == 14], [14, 7], rows[:, 6])
    assert np.array_equal(exchanged[:, :6], rows[:, :6])
    assert np.array_equal(exchanged[:, 6], category_ids)


def test_what_cannot_be_compared_is_said(detectors, data, tmp_path):
    good = detectors["ssd_resnet34"]
    state = checkpoint.load(good)
    state["classes"] = ["person", "cat", "wolf"]
    checkpoint.save(tmp_path / "wolf.pt", state)
    message = r"wolf\.pt: its classes are not those of .*iter_1\.pt: dog missing, wolf besides; "
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "out", good, tmp_path / "wolf.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no checkpoint in this folder; give the folder"):
        run(data, tmp_path / "out", tmp_path / "empty")
    torch.save({"transformer.weight": torch.zeros(1)}, tmp_path / "detr.pth")
    with pytest.raises(UserError, match=r"detr\.pth: a DETR detector, not a detector of this"):
        run(data, tmp_path / "out", tmp_path / "detr.pth")
    assert not (tmp_path / "out").exists()


def test_of_a_folder_the_best_checkpoint_counts(detectors, tmp_path):
    shutil.copy(detectors["fcos"], tmp_path / "iter_7.pt")
    assert compare.load_state(str(tmp_path))["path"].endswith("iter_7.pt")
    shutil.copy(detectors["fcos"], tmp_path / "best.pt")
    assert compare.load_state(str(tmp_path))["path"].endswith("best.pt")


def test_names_are_as_short_as_they_can_be():
    paths = ["a/ssd/output/0/best.pt", "a/fcos/output/0/best.pt"]
    assert short_names(paths) == ["ssd", "fcos"]
    assert short_names(["a/best.pt", "a/iter_3.pt"]) == ["best.pt", "iter_3.pt"]
    assert short_names(["x.pt"]) == ["x.pt"]
    assert short_names(["a/b.pt", "a/b.pt"]) == ["1: b.pt", "2: b.pt"]


def test_the_best_is_marked_unless_all_are_equal():
    assert best_of([0.1, 0.3, 0.2], max) == 1
    assert best_of([3.0, 2.0], min) == 1
    assert best_of([0.1, 0.1], max) is None
    row = comparison.metric_row("AP", [0.25, -1.0])
    assert row == Row("AP", ["0.2500", "-"], best=0)
    assert comparison.metric_row("AP", [0.25, 0.25001]).best is None
