"""`run.json` of a run, and the run that is started from it."""

import hashlib
import json
import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from common import __version__
from common.coco.layout import Files
from common.npu import record
from tests.common.test_run import RECIPE, parts_of, start, train


def of_folder(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_run_says_what_it_was_and_how_it_ended(tmp_path):
    annotations = tmp_path / "a.json"
    annotations.write_text("{}")
    run = start(tmp_path / "out", "--max_iters=2", "--kind=perf", "--seed=3", f"--data={tmp_path}")
    _, progress = parts_of(run)
    with run.open_output(RECIPE, progress, [Files(str(annotations), str(tmp_path), "plain")]):
        at_start = of_folder(tmp_path / "out")
        progress.steps_done = 2
    at_end = of_folder(tmp_path / "out")
    assert (at_start["result"], at_start["ended"], at_start["steps"]) == ("running", None, None)
    assert (at_end["result"], at_end["steps"], at_end["best_AP"]) == ("finished", 2, None)
    assert at_end["started"] <= at_end["ended"]
    assert at_end["command"] == list(run.command)
    assert at_end["flags"] == {
        "output_dir": str(tmp_path / "out"),
        "data": str(tmp_path),
        "device": "cpu",
        "log_interval": 1,
        "max_iters": 2,
        "kind": "perf",
        "seed": 3,
    }
    assert at_end["recipe"]["lr"] == 0.1
    assert (at_end["ranks"], at_end["resumed"]) == (1, None)
    assert at_end["versions"]["onestage"] == __version__
    assert at_end["versions"]["torch"] == torch.__version__
    assert at_end["data"] == [
        {"path": str(tmp_path)},
        {"path": str(annotations), "sha256": hashlib.sha256(b"{}").hexdigest()},
    ]


def test_a_run_that_fails_or_is_stopped_says_so(tmp_path):
    run = start(tmp_path / "fails", "--kind=perf")
    _, progress = parts_of(run)

    def fail():
        with run.open_output(RECIPE, progress):
            progress.steps_done = 1
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        fail()
    assert of_folder(tmp_path / "fails")["result"] == "error: RuntimeError: a mistake"
    assert of_folder(tmp_path / "fails")["steps"] == 1

    run = start(tmp_path / "stops", "--kind=perf")
    run.stop = Namespace(agreed=lambda ranks, also: True, status=143)
    train(run, *parts_of(run))
    assert of_folder(tmp_path / "stops")["result"] == "stopped"


def test_a_run_that_goes_on_keeps_the_file_of_the_earlier_process(tmp_path):
    run = start(tmp_path, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    run = start(tmp_path, "--max_iters=2", "--kind=perf", "--resume=auto")
    state, progress = parts_of(run)
    state.restore()
    train(run, state, progress)
    (earlier,) = tmp_path.glob("run_*.json")
    assert json.loads(earlier.read_text())["steps"] == 1
    now = of_folder(tmp_path)
    assert now["resumed"] == {"checkpoint": str(tmp_path / "iter_1.pt"), "step": 1}
    assert (now["steps"], now["flags"]["resume"]) == (2, "auto")


def test_a_run_can_be_repeated_from_its_file_in_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = start("out", "--max_iters=1", "--kind=perf", "--data=.")
    train(run, *parts_of(run))
    first = of_folder(tmp_path / "out")

    monkeypatch.chdir("/")
    content = {**first, "ranks": 8}
    (tmp_path / "out/run.json").write_text(json.dumps(content))
    config = f"--config={tmp_path}/out/run.json"
    run = start(tmp_path / "out", config, "--max_iters=2")
    assert run.inputs == (str(tmp_path),)
    train(run, *parts_of(run))
    assert "unlike in the run of --config, ranks is 1; it was 8" in capsys.readouterr().out
    assert of_folder(tmp_path / "out")["flags"] == {**first["flags"], "max_iters": 2}


def test_the_file_says_where_the_weights_of_a_renamed_run_are(tmp_path):
    run = start(tmp_path / "out", "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    weights = tmp_path / "out/iter_1.pt"
    run = start(tmp_path / "out", "--max_iters=2", "--kind=perf", f"--checkpoint={weights}")
    train(run, *parts_of(run))
    (former,) = tmp_path.glob("out_*")
    assert of_folder(tmp_path / "out")["flags"]["checkpoint"] == str(former / "iter_1.pt")


def test_weights_have_hashes_and_other_ones_are_noticed(tmp_path, capsys):
    weights = tmp_path / "net.pth"
    torch.save({"model": {"a": torch.ones(1)}}, weights)
    words = (f"--checkpoint={weights}", "--max_iters=1", "--kind=perf")
    run = start(tmp_path / "out", *words)
    train(run, *parts_of(run))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert of_folder(tmp_path / "out")["weights"] == [{"path": str(weights), "sha256": digest}]

    torch.save({"model": {"a": torch.zeros(1)}}, weights)
    run = start(tmp_path / "again", f"--config={tmp_path}/out/run.json")
    run.output_dir = tmp_path / "again"
    train(run, *parts_of(run))
    assert f"{weights} has another content than it had" in capsys.readouterr().out

    # A run that goes on does not read them.
    run = start(tmp_path / "out", *words, "--max_iters=2", "--resume=auto")
    state, progress = parts_of(run)
    state.restore()
    train(run, state, progress)
    assert of_folder(tmp_path / "out")["weights"] == []


def test_weights_of_tensorflow_are_several_files(tmp_path):
    for name in ("model.ckpt-5.index", "model.ckpt-5.data-00000-of-00001", "model.ckpt-50.index"):
        (tmp_path / name).write_text(name)
    files = record.describe_weights([str(tmp_path / "model.ckpt-5")])
    names = [file["path"].rpartition("/")[2] for file in files]
    assert names == ["model.ckpt-5.data-00000-of-00001", "model.ckpt-5.index"]
    assert files[1]["sha256"] == hashlib.sha256(b"model.ckpt-5.index").hexdigest()
    folder = {"path": str(tmp_path)}
    assert record.describe_weights([str(tmp_path)]) == [folder]


def test_a_list_of_numbers_is_a_line(tmp_path):
    content = {"steps": [3, -5], "scale": [0.5, 1e-07], "command": ["a  b", "[ 1,  2 ]"]}
    record.RunRecord(tmp_path, content).begin()
    text = (tmp_path / "run.json").read_text()
    assert '"steps": [ 3, -5 ]' in text
    assert '"scale": [ 0.5, 1e-07 ]' in text
    assert content.items() <= json.loads(text).items()


def test_a_recipe_with_infinity_is_json():
    recipe = record.recipe_as_json(replace(RECIPE, evaluation=(0.5, -math.inf)))
    assert recipe["evaluation"] == [0.5, "-Infinity"]
    json.dumps(recipe, allow_nan=False)


def test_in_what_a_repeated_run_differs():
    files = [{"path": "/a.json", "sha256": "1"}, {"path": "/images"}]
    before = {
        "ranks": 8,
        "recipe": {"lr": 0.1, "steps": [3], "gone": 1},
        "data": files,
        "weights": [{"path": "/w.pt", "sha256": "4"}],
    }
    assert record.differences(before, {**before, "recipe": {"lr": 0.1, "steps": (3,)}}) == []
    now = {
        "ranks": 1,
        "recipe": {"lr": 0.2, "steps": [3], "new": 5},
        "data": [{"path": "/a.json", "sha256": "2"}, {"path": "/b.json", "sha256": "3"}],
        "weights": [{"path": "/w.pt", "sha256": "5"}],
    }
    assert record.differences(before, now) == [
        "ranks is 1; it was 8",
        "lr is 0.2; it was 0.1",
        "/a.json has another content than it had",
        "/w.pt has another content than it had",
    ]
