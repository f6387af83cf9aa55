"""What a run checks, writes and takes up again, through the programs of all four models."""

import html
import json
import sys
import threading

import pytest

from common.coco.evaluation import STATS
from common.errors import UserError
from common.npu import checkpoint, overlap
from tests import scripts
from tests.test_own_data import module, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=4, val=2)


@pytest.fixture(
    scope="module",
    params=["ssd_resnet34", "ssd_mmdet", "fcos", pytest.param("m2det", marks=pytest.mark.again)],
)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    """The folder of a run of two steps and an evaluation."""
    folder = tmp_path_factory.mktemp(model) / "run"
    train(model, data, folder)
    return folder


def evaluate(model, data, trained, output, *flags):
    module(model, "evaluate").main(
        [
            *("--device=cpu", "--num_workers=0", "--eval_batch_size=2"),
            f"--data={data}",
            f"--checkpoint={trained / 'best.pt'}",
            f"--output_dir={output}",
            *flags,
        ]
    )


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_and_an_evaluation_write_the_same_metrics(model, data, trained, tmp_path, capsys):
    of_run = metrics(trained)
    assert of_run.pop("step") == 2
    evaluate(model, data, trained, tmp_path)
    of_evaluation = metrics(tmp_path)
    assert of_evaluation.pop("speed") > 0
    assert list(of_evaluation) == [*STATS, "images", "best_f1", "classes"]
    for name in STATS:
        assert of_evaluation[name] == pytest.approx(of_run[name], abs=1e-6)
    for folder in (trained, tmp_path):
        for name in ("analysis.json", "errors.png", "confusion.png", "suspect_labels.json"):
            assert (folder / name).stat().st_size > 0
    # The run had no goal, whatever the first preset has.
    output = capsys.readouterr().out
    assert "goal" not in output
    assert ("Current AP: " in output) == (model != "ssd_mmdet")


def test_a_run_and_an_evaluation_write_a_page(model, data, trained, tmp_path):
    page = (trained / "report.html").read_text()
    record = json.loads((trained / "run.json").read_text())
    assert record["model"] == model
    for text in (record["command"][-1], record["versions"]["torch"], record["recipe"]["name"]):
        assert html.escape(text) in page
    assert page.count("<svg") >= 4  # loss, rate, speed and AP
    evaluate(model, data, trained, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert str(trained / "best.pt") in page
    assert 'id="curves"' not in page


def test_metrics_in_the_background_are_those_of_a_run_that_waits(model, data, tmp_path):
    every_epoch = ("--evaluation=1,2,3", "--save_interval=1", "--keep=9")
    train(model, data, tmp_path / "waits", *every_epoch)
    train(model, data, tmp_path / "goes_on", *every_epoch, "--background_metrics")
    val_lines = []
    for name in ("waits", "goes_on"):
        assert metrics(tmp_path / name)["step"] == 2
        assert (tmp_path / name / "detections.png").exists()
        lines = scripts.json_lines(tmp_path / name)
        val_lines.append([line for line in lines if line.get("mode") == "val"])
    assert val_lines[0] == val_lines[1]
    scripts.assert_same_state(tmp_path / "waits" / "best.pt", tmp_path / "goes_on" / "best.pt")


def detections(folder):
    return json.loads((folder / "results.bbox.json").read_text())


def test_an_accelerators_thread_detects_the_same(model, data, trained, tmp_path, monkeypatch):
    flags = ("--eval_batch_size=1", "--format_only", "--score_threshold=0.001")
    evaluate(model, data, trained, tmp_path / "at_once", *flags)
    expected = detections(tmp_path / "at_once")
    assert len({detection["image_id"] for detection in expected}) == 2

    threads = []
    program = module(model, "evaluate")
    finish_detect = program.finish_detect

    def note_thread(*arguments):
        threads.append(threading.get_ident())
        return finish_detect(*arguments)

    monkeypatch.setattr(overlap, "in_host_memory", lambda device: False)
    monkeypatch.setattr(program, "finish_detect", note_thread)
    evaluate(model, data, trained, tmp_path / "thread", *flags)
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    assert detections(tmp_path / "thread") == expected

    def fail(*arguments):
        raise UserError("the host cannot go on")

    monkeypatch.setattr(program, "finish_detect", fail)
    with pytest.raises(UserError, match=r"^the host cannot go on$"):
        evaluate(model, data, trained, tmp_path / "error", *flags)


def test_what_an_evaluation_needs_is_there_before_it_detects(
    model, data, trained, tmp_path, monkeypatch
):
    def detect_all(*arguments):
        pytest.fail("detected")

    monkeypatch.setattr(module(model, "evaluate"), "detect_all", detect_all)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"/file cannot be written: File exists; a file is where"):
        evaluate(model, data, trained, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match="pip install pycocotools faster-coco-eval"):
        evaluate(model, data, trained, tmp_path)


def test_a_resumed_run_has_the_options_of_its_flags(model, data, trained, tmp_path, capsys):
    flags = ("--max_iters=3", "--kind=perf", f"--resume={trained}/iter_2.pt")
    train(model, data, tmp_path, *flags, "--weight_decay=0.25", "--momentum=0.5", "--lr=0.125")
    output = capsys.readouterr().out
    for field, value in (("weight_decay", 0.25), ("momentum", 0.5), ("lr", 0.125)):
        assert f"from here on {field} is {value}; it was " in output
    assert output.count("from here on ") == 3
    saved = checkpoint.load(tmp_path / "iter_3.pt")
    assert (saved["recipe"]["weight_decay"], saved["recipe"]["momentum"]) == (0.25, 0.5)
    for group in saved["optimizer"]["param_groups"]:
        assert group["momentum"] == 0.5
        assert group["weight_decay"] in (0.25, 0)  # fcos: none for biases
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


def test_a_run_is_repeated_from_its_folder(data, tmp_path, monkeypatch):
    first, again = tmp_path / "first", tmp_path / "again"
    train("ssd_mmdet", data, first, "--kind=perf")
    monkeypatch.chdir(tmp_path)
    flags = (f"--config={first}/run.json", "--output_dir=again")
    module("ssd_mmdet", "train").main(flags)
    scripts.assert_same_state(first / "iter_2.pt", again / "iter_2.pt")
    before = json.loads((first / "run.json").read_text())
    now = json.loads((again / "run.json").read_text())
    assert now["recipe"] == before["recipe"]
    assert now["data"] == before["data"]
    assert sum("sha256" in file for file in now["data"]) == 2
    assert now["flags"] == {**before["flags"], "output_dir": str(again)}


def test_a_run_that_is_refused_has_moved_nothing(model, data, trained, tmp_path):
    before = sorted(trained.parent.rglob("*"))
    recipe = checkpoint.load(trained / "best.pt")["recipe"]
    other = "--no_augment" if recipe["augment"] else "--augment"
    refused = (
        ((f"--train_annotations={tmp_path}/none.json",), r"none\.json: no such file"),
        (("--num_classes=3",), "--num_classes 3: the annotations have 80; omit it"),
        (
            ("--resume=auto", other),
            r"differs in augment \((True|False) before, (True|False) now\); go on as it",
        ),
        (("--batch_size=999999999",), r"the images of one batch take .* give a smaller one"),
    )
    for flags, message in refused:
        with pytest.raises(UserError, match=message):
            train(model, data, trained, *flags)
    assert sorted(trained.parent.rglob("*")) == before
