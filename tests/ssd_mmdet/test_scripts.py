"""The launch scripts, end to end on real images: every file they promise, every flag."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.fps import calc_fps
from tests import scripts
from tests.ssd_mmdet import runs

pytestmark = pytest.mark.slow
SHORT = (*runs.THIN, "--num_workers=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=6, val=4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run of train_full_8p.sh with 2 processes, and what it printed."""
    output = tmp_path_factory.mktemp("trained") / "8"
    flags = (f"--data_path={data}", f"--output_dir={output}", "--nproc_per_node=2")
    more = ("--batch_size=4", "--train_epochs=2", "--log_interval=1")
    done = runs.run("train_full_8p.sh", *flags, *SHORT, *more)
    return output, done.stdout


def summary(folder, kind):
    (path,) = folder.glob(f"*_{kind}.log")
    return path.name, dict(line.split(" = ") for line in path.read_text().splitlines())


def test_full_training_leaves_every_file(trained):
    output, said = trained
    name, values = summary(output, "acc")
    assert name == "SSD_bs4_2p_acc.log"
    assert list(values) == [
        "Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS",
        "TrainingTime", "TrainAccuracy", "ActualLoss", "E2ETrainingTime",
    ]  # fmt: skip
    assert values["Network"] == "SSD"
    fps, step_ms = float(values["ActualFPS"]), float(values["TrainingTime"])
    assert step_ms == pytest.approx(8000 / fps, rel=0.01)
    pictures = ("curves.png", "detections.png", "pr_curves.png", "confusion.png", "errors.png")
    for file in (*pictures, "analysis.json", "results.bbox.json", "best.pt"):
        assert (output / file).stat().st_size > 0, file
    log = (output / "train_2.log").read_text()
    # 6 images in 5 passes: 30 positions of two kinds, each filled up to whole batches of 8.
    steps = int(re.search(r"(\d+) iterations an epoch", log)[1])
    assert steps in (4, 5)
    assert scripts.checkpoints(output) == [steps, 2 * steps]
    words = ("base learning rate 0.00025", f"Epoch [2][1/{steps}]\tlr:", f"Epoch(val) [2][{steps}]")
    assert all(w in log for w in words)
    for words in ("Final result", "Final Performance images/sec : ", "Final Train Accuracy : "):
        assert words in said
    assert list((output / "tensorboard").iterdir())


def json_lines(output):
    (path,) = output.glob("*.log.json")
    return path, path.read_text().splitlines()


def analyze_logs_of_2x(lines):
    """MMDetection 2.x's reading: line 1 and lines without `epoch` are skipped, values gathered by
    epoch; losses over `iter`, with the second-to-last `iter` of the first epoch as its length.

    Returns the epochs' values by key, and the curve's points.
    """
    epochs, xs, ys = {}, [], []
    for text in lines[1:]:
        log = json.loads(text)
        if "epoch" not in log:
            continue
        own = epochs.setdefault(log.pop("epoch"), {})
        for key, value in log.items():
            own.setdefault(key, []).append(value)
    length = next(iter(epochs.values()))["iter"][-2]
    for epoch, log in epochs.items():
        iters = log["iter"][:-1] if log["mode"][-1] == "val" else log["iter"]
        xs += [iter + (epoch - 1) * length for iter in iters]
        ys += log["loss"][: len(iters)]
    return epochs, xs, ys


def analyze_logs_of_3x(lines):
    """MMDetection 3.x's: every line counts, for the epoch that the line before it named; losses
    over `step`."""
    epochs, epoch = {}, 1
    for log in map(json.loads, lines):
        own = epochs.setdefault(epoch, {})
        for key, value in log.items():
            own.setdefault(key, []).append(value)
        epoch = log.get("epoch", epoch)
    xs = [step for log in epochs.values() for step in log["step"]]
    return xs, [loss for log in epochs.values() for loss in log["loss"][: len(log["step"])]]


def test_the_json_log_is_what_mmdetections_tools_read(trained):
    path, lines = json_lines(trained[0])
    assert re.fullmatch(r"\d{8}_\d{6}\.log\.json", path.name)
    head = json.loads(lines[0])
    assert {"env_info", "config", "seed", "exp_name"} <= head.keys()
    assert not {"mode", "epoch"} & head.keys()
    train = [log for log in map(json.loads, lines) if log.get("mode") == "train"]
    steps = len(train) // 2
    epochs, xs, ys = analyze_logs_of_2x(lines)
    assert sorted(epochs) == [1, 2]
    assert all(log["mode"] == ["train"] * steps + ["val"] for log in epochs.values())
    assert xs == list(range(1, 2 * steps + 1))
    assert ys == [log["loss"] for log in train]
    times = np.array([log["time"] for log in epochs.values()])  # as many in each epoch
    assert times.shape == (2, steps)
    assert times.mean() == pytest.approx(np.mean([log["time"] for log in train]))
    assert (xs, ys) == analyze_logs_of_3x(lines)
    for log in epochs.values():
        (score,) = log["bbox_mAP"]
        copied = float(log["bbox_mAP_copypaste"][0].split()[0])
        assert copied == pytest.approx(score, abs=0.00055)  # 3 decimals of 4
    for log in train:
        assert log["loss"] == pytest.approx(log["loss_cls"] + log["loss_bbox"], abs=2e-5)


def test_calc_fps_as_a_program(trained):
    path, lines = json_lines(trained[0])
    command = [sys.executable, runs.MODEL / "calc_fps.py", path, "2", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *epochs, total = map(eval, done.stdout.splitlines())
    assert [line["epoch"] for line in epochs] == [1, 2]
    rates = [
        [
            8 / log["time"]
            for log in map(json.loads, lines)
            if log.get("epoch") == n and "time" in log
        ]
        for n in (1, 2)
    ]
    means = [sum(part) / len(part) for part in rates]  # none is beyond iteration 50: all count
    assert [line["fps"] for line in epochs] == pytest.approx(means)
    assert total["fps"] == pytest.approx(sum(means) / 2)
    assert calc_fps.fps_per_epoch(calc_fps.read_json_log(path), 2, 4) == pytest.approx(means)


@pytest.mark.again
def test_evaluation_takes_the_newest_checkpoint_or_the_named_one(trained, data, tmp_path):
    output, _ = trained
    accuracy = summary(output, "acc")[1]["TrainAccuracy"]
    where = (f"--data_path={data}", "--nproc_per_node=2", "--device=cpu", "--num_workers=0")
    newest = runs.run("train_eval_8p.sh", *where, f"--output_dir={output}")
    assert f"iter_{scripts.checkpoints(output)[-1]}.pt" in newest.stdout
    assert summary(output, "eval")[1]["TrainAccuracy"] == accuracy
    named = f"--checkpoint_path={output / 'best.pt'}"
    runs.run("train_eval_8p.sh", *where, named, f"--output_dir={tmp_path}", "--per_class")
    name, values = summary(tmp_path, "eval")
    assert name == "SSD_bs8_2p_eval.log"
    assert "ActualFPS" not in values


def test_mmdetections_checkpoint_is_evaluated(trained, data, tmp_path):
    """Its own layout, classes in `meta` beside objects, wrapped in `state_dict`."""
    kept = torch.load(trained[0] / "best.pt", weights_only=True)
    meta = {"CLASSES": tuple(kept["classes"]), "best": np.float64(0.25), "where": Path("a")}
    state = {"meta": meta, "state_dict": kept["model"]}
    torch.save({**state, "recipe": kept["recipe"]}, tmp_path / "epoch_24.pth")
    flags = (f"--data={data}", f"--checkpoint={tmp_path}/epoch_24.pth", f"--output_dir={tmp_path}")
    runs.run("evaluate.py", *flags, "--device=cpu", "--format_only", "--max_detections=3")
    rows = json.loads((tmp_path / "results.bbox.json").read_text())
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    assert max(sum(r["image_id"] == row["image_id"] for r in rows) for row in rows) <= 3


def test_performance_on_one_device_with_the_public_flags(data, tmp_path):
    output = tmp_path / "0"
    flags = (f"--data_path={data}", f"--output_dir={output}", "--device_id=0", *SHORT)
    public = ("--batch_size=3", "--loss_scale=dynamic", "--seed=3", "--clip_norm=10")
    runs.run("train_performance_1p.sh", *flags, *public, "--max_iters=2")
    name, values = summary(output, "perf")
    assert name == "SSD_bs3_1p_perf.log"
    assert "TrainAccuracy" not in values
    assert not (output / "results.bbox.json").exists()
    header = json.loads(json_lines(output)[1][0])
    assert header["seed"] == 3
    assert "loss_scale = 'dynamic'" in header["config"]
    assert "clip_norm = 10.0" in header["config"]


@pytest.mark.again
def test_8_processes(data, tmp_path):
    where = (f"--data_path={data}", f"--output_dir={tmp_path}/8")
    runs.run("train_performance_8p.sh", *where, *SHORT, "--batch_size=1", "--max_iters=2")
    assert summary(tmp_path / "8", "perf")[1]["RankSize"] == "8"
    assert scripts.checkpoints(tmp_path / "8") == [2]


def test_finetuning_on_own_classes_and_ssd512(trained, tmp_path):
    output, _ = trained
    data = scripts.subset(tmp_path / "own", train=4, val=2, classes=["cat", "hat", "bat"])
    # The checkpoint lies in the folder that makes room for the new run.
    shutil.copytree(output, tmp_path / "run")
    flags = (f"--data_path={data}", f"--output_dir={tmp_path}/run", "--batch_size=2")
    first = f"--checkpoint_path={tmp_path}/run/best.pt"
    done = runs.run("train_full_1p.sh", *flags, *SHORT, first, "--max_iters=2")
    assert "1 classes of the same name keep their weights: cat" in done.stdout
    assert "2 initialised anew: hat, bat" in done.stdout
    assert "3 classes" in done.stdout
    rows = json.loads((tmp_path / "run/results.bbox.json").read_text())
    assert {row["category_id"] for row in rows} <= {0, 7, 14}

    flags = (f"--data={data}", f"--output_dir={tmp_path}/512", "--batch_size=1", "--recipe=ssd512")
    runs.run("train.py", *flags, *SHORT, "--max_iters=2")
    assert summary(tmp_path / "512", "acc")[0] == "SSD512_bs1_1p_acc.log"
    # The checkpoint says which network it is.
    flags = (f"--data={data}", f"--output_dir={tmp_path}/512", "--format_only", "--device=cpu")
    assert "79 tensors loaded" in runs.run("evaluate.py", *flags).stdout


def test_data_path_is_asked_for():
    done = runs.run("train_full_1p.sh", status=1)
    assert done.stderr.startswith("error: give the folder of the data set with --data_path=DIR")
    assert '[Error] para "data_path" must be confing' in done.stderr


def test_demo_draws_and_lists(trained, data, tmp_path):
    checkpoint = f"--checkpoint={trained[0] / 'best.pt'}"
    image = next((data / "val2017").iterdir())
    flags = (checkpoint, f"--img={image}", f"--show-dir={tmp_path}", "--score-thr=0.013")
    done = runs.run("demo.py", *flags, "--device=cpu", "--config=configs/a.py", "--show")
    assert "--config has no effect: the checkpoint shows its network" in done.stdout
    assert "--show has no effect" in done.stdout
    assert (tmp_path / image.name).stat().st_size > 0
    (found,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert {"boxes", "scores", "classes"} == found.keys()
