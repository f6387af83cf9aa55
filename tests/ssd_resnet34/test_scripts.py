"""The launch scripts, end to end on real images: every file they promise, every flag."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest

from common.fps import calc_fps
from tests import scripts

pytestmark = pytest.mark.slow
SHORT = ("--backbone=resnet10", "--device=cpu", "--amp=O0", "--num_workers=0", "--threshold=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=16, val=4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run of train_full_8p.sh with 2 processes, and what it printed."""
    output = tmp_path_factory.mktemp("trained") / "8"
    flags = (f"--data_path={data}", f"--output_dir={output}", "--nproc_per_node=2")
    done = scripts.run("train_full_8p.sh", *flags, *SHORT, "--batch_size=2", "--max_iters=4")
    return output, done.stdout


def summary(folder, kind):
    (path,) = folder.glob(f"*_{kind}.log")
    return path.name, dict(line.split(" = ") for line in path.read_text().splitlines())


def test_full_training_leaves_every_file(trained):
    output, said = trained
    name, values = summary(output, "acc")
    assert name == "SSD-ResNet34_bs2_2p_acc.log"
    assert list(values) == [
        "Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS",
        "TrainingTime", "TrainAccuracy", "ActualLoss", "E2ETrainingTime",
    ]  # fmt: skip
    fps, step_ms = float(values["ActualFPS"]), float(values["TrainingTime"])
    assert step_ms == pytest.approx(4000 / fps, rel=0.01)
    assert int(values["E2ETrainingTime"]) >= 4 * step_ms / 1000
    pictures = ("curves.png", "detections.png", "pr_curves.png", "confusion.png", "errors.png")
    for file in (*pictures, "analysis.json", "results.bbox.json", "best.pt"):
        assert (output / file).stat().st_size > 0, file
    assert scripts.checkpoints(output) == [4]
    log = (output / "train_2.log").read_text()
    for words in ("base learning rate 0.0025", "Epoch [1][2/4]\tlr:", "Epoch(val) [1][4]"):
        assert words in log
    for words in ("Final result", "Final Performance images/sec : ", "Final Train Accuracy : "):
        assert words in said
    assert list((output / "tensorboard").iterdir())


def test_a_run_that_ended_before_its_summary_gets_it_when_resumed(trained, data, tmp_path):
    output = tmp_path / "8"
    shutil.copytree(trained[0], output)
    for path in (*output.glob("*_acc.log"), output / "curves.png"):
        path.unlink()
    flags = (f"--data_path={data}", f"--output_dir={output}", "--nproc_per_node=2", *SHORT)
    flags = (*flags, "--batch_size=2", "--max_iters=4", "--resume=auto")
    scripts.run("train_full_8p.sh", *flags)
    _, values = summary(output, "acc")
    _, before = summary(trained[0], "acc")
    assert values["TrainAccuracy"] == before["TrainAccuracy"]
    assert "ActualFPS" not in values  # of no step
    assert (output / "curves.png").exists()


def test_the_json_log_is_what_the_old_tools_read(trained):
    output, _ = trained
    (path,) = output.glob("*.log.json")
    assert re.fullmatch(r"\d{8}_\d{6}\.log\.json", path.name)
    lines = calc_fps.read_json_log(path)
    assert set(lines[0]) >= {"env_info", "config", "seed", "exp_name"}
    assert "mode" not in lines[0]
    train = [line for line in lines if line.get("mode") == "train"]
    assert [line["iter"] for line in train] == [2, 4]
    assert list(train[0])[:3] == ["mode", "epoch", "iter"]
    (val,) = [line for line in lines if line.get("mode") == "val"]
    assert {"bbox_mAP", "bbox_mAP_50", "bbox_mAP_copypaste", "lr"} <= set(val)
    (mean,) = calc_fps.fps_per_epoch(lines, 2, 2)
    rates = [4 / line["time"] for line in train]  # none is beyond iteration 50: all count
    assert mean == pytest.approx(sum(rates) / 2)


def test_evaluation_takes_the_newest_checkpoint_or_the_named_one(trained, data, tmp_path):
    output, _ = trained
    accuracy = summary(output, "acc")[1]["TrainAccuracy"]
    where = (f"--data_path={data}", "--nproc_per_node=2", "--device=cpu", "--num_workers=0")
    newest = scripts.run("train_eval_8p.sh", *where, f"--output_dir={output}")
    assert "iter_4.pt" in newest.stdout
    assert summary(output, "eval")[1]["TrainAccuracy"] == accuracy
    named = f"--checkpoint_path={output / 'best.pt'}"
    more = (f"--output_dir={tmp_path}", "--per_class", "--tag=mine_")
    done = scripts.run("train_eval_8p.sh", *where, named, *more)
    name, values = summary(tmp_path, "eval")
    assert name.startswith("mine_SSD-ResNet34_bs")
    assert values["TrainAccuracy"] == accuracy
    assert re.search(r"^person +\d+ +\d\.\d{3} ", done.stdout, re.MULTILINE)


def test_format_only_writes_a_submission(trained, data, tmp_path):
    output, _ = trained
    flags = (f"--data={data}", f"--checkpoint={output / 'best.pt'}", f"--output_dir={tmp_path}")
    more = ("--device=cpu", "--score_threshold=0.01", "--max_detections=3")
    done = scripts.run("evaluate.py", *flags, *more, "--format_only")
    rows = json.loads((tmp_path / "results.bbox.json").read_text())
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    assert max(sum(r["image_id"] == row["image_id"] for r in rows) for row in rows) == 3
    assert "Average Precision" not in done.stdout


def test_performance_on_one_device_with_the_public_flags(data, tmp_path):
    output = tmp_path / "0"
    flags = (f"--data={data}", f"--output_dir={output}", "--device_id=0", *SHORT)
    public = ("--batch-size=4", "--loss_scale=64", "--seed=3", "--lr=2.5e-3", "--max_iters=2")
    scripts.run("train_performance_1p.sh", *flags, *public)
    name, values = summary(output, "perf")
    assert name == "SSD-ResNet34_bs4_1p_perf.log"
    assert "TrainAccuracy" not in values
    assert not (output / "results.bbox.json").exists()
    header = json.loads(next(output.glob("*.log.json")).read_text().splitlines()[0])
    assert header["seed"] == 3
    assert "loss_scale = '64'" in header["config"]
    # A second run keeps the first one's files.
    scripts.run("train_performance_1p.sh", *flags, "--batch_size=4", "--max_iters=1")
    (kept,) = tmp_path.glob("0_*")
    assert (kept / "iter_2.pt").exists()
    assert scripts.checkpoints(output) == [1]


def test_8_processes(data, tmp_path):
    where = (f"--data_path={data}", f"--output_dir={tmp_path}/8")
    scripts.run("train_performance_8p.sh", *where, *SHORT, "--batch_size=1", "--max_iters=2")
    assert summary(tmp_path / "8", "perf")[1]["RankSize"] == "8"
    assert scripts.checkpoints(tmp_path / "8") == [2]


@pytest.mark.again
def test_two_nodes_resume_without_a_common_folder(data, tmp_path):
    shared = (f"--data_path={data}", *SHORT, "--batch_size=2", "--log_interval=1")
    net = ("--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1", "--master_addr=127.0.0.1")

    def train(*flags):
        port = f"--master_port={scripts.free_port()}"
        with ExitStack() as stack:
            nodes = [
                stack.enter_context(
                    scripts.running(
                        "train_performance_multinodes.sh",
                        *(*shared, *net, port, *flags),
                        f"--node_rank={node}",
                        f"--output_dir={tmp_path}/{node}",
                    )
                )
                for node in (0, 1)
            ]
            assert [node.wait(200) for node in nodes] == [0, 0]

    train("--max_iters=2")
    assert summary(tmp_path / "0", "perf")[1]["RankSize"] == "2"
    train("--max_iters=4", "--resume=auto")
    assert not list(tmp_path.glob("1/iter_*.pt"))
    whole = ("--max_iters=4", f"--output_dir={tmp_path}/whole")
    scripts.run("train_performance_8p.sh", *shared, "--nproc_per_node=2", *whole)
    assert scripts.losses(tmp_path / "0") == scripts.losses(tmp_path / "whole")
    assert len(scripts.losses(tmp_path / "0")) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nproc_per_node=abc"], "--nproc_per_node=abc: give a whole number"),
        (["--nproc_per_node=0"], "--nproc_per_node=0: give at least 1"),
        (["--nnodes=-1"], "--nnodes=-1: give a whole number"),
        (["--nnodes=2", "--node_rank=2"], "of --nnodes=2 the last is 1"),
        (["3"], "3 is no flag"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(flags, words):
    done = scripts.run("train_performance_multinodes.sh", "--data_path=.", *flags, status=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_missing_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(scripts.sys, "executable", "/nowhere/python3")
    done = scripts.run("train_full_1p.sh", "--data_path=.", status=2)
    assert done.stderr.startswith("error: PYTHON=/nowhere/python3 does not exist; unset PYTHON")


def test_finetuning_on_own_classes(trained, tmp_path):
    output, _ = trained
    data = scripts.subset(tmp_path / "own", train=4, val=2, classes=["cat", "hat", "bat"])
    where = (f"--data_path={data}", f"--output_dir={tmp_path}/run")
    # The checkpoint lies in the folder that makes room for the new run.
    shutil.copytree(output, tmp_path / "run")
    flags = (f"--checkpoint_path={tmp_path}/run/best.pt", "--batch_size=2", "--max_iters=2")
    done = scripts.run("train_finetune_1p.sh", *where, *SHORT, *flags)
    assert "1 classes of the same name keep their weights: cat" in done.stdout
    assert "2 initialised anew: hat, bat" in done.stdout
    assert "3 classes" in done.stdout
    rows = json.loads((tmp_path / "run/results.bbox.json").read_text())
    assert {row["category_id"] for row in rows} <= {0, 7, 14}


def test_data_path_is_asked_for():
    done = scripts.run("train_full_1p.sh", status=1)
    assert done.stderr.startswith("error: give the folder of the data set with --data_path=DIR")
    assert '[Error] para "data_path" must be confing' in done.stderr


def test_the_four_paths_suffice_and_win(data, tmp_path):
    paths = []
    for split in ("train", "val"):
        paths.append(f"--{split}_annotations={data}/annotations/instances_{split}2017.json")
        paths.append(f"--{split}_images={data}/{split}2017")
    short = (*SHORT, "--batch_size=2", "--max_iters=1", f"--output_dir={tmp_path}/0")
    done = scripts.run("train_performance_1p.sh", *short, *paths)
    assert f"data: {data}/annotations/instances_val2017.json, images in" in done.stdout
    assert "note: " not in done.stderr
    done = scripts.run("train_performance_1p.sh", *short, *paths, "--data_path=elsewhere")
    assert done.stderr.count("note: what --train_annotations, --train_images") == 1


def test_the_environment_script_is_silent_and_keeps_what_is_set():
    script = f"set -eu; source {scripts.MODEL}/test/env_npu.sh; env"
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": "/usr/bin:/bin", "HCCL_CONNECT_TIMEOUT": "77"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "HCCL_CONNECT_TIMEOUT=77" in done.stdout
    assert "TASK_QUEUE_ENABLE=2" in done.stdout
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stdout


@pytest.mark.parametrize("chosen", ["", "taskset --cpu-list 0 "])
def test_ranks_are_bound_where_cores_are_not_chosen_already(chosen):
    if os.cpu_count() == 1 or len(os.sched_getaffinity(0)) < os.cpu_count():
        pytest.skip("needs two cores that are free to choose")
    script = f"source {scripts.MODEL}/test/env_npu.sh; echo ${{CPU_AFFINITY_CONF-unset}}"
    command = [*chosen.split(), "bash", "-c", script]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == ("unset\n" if chosen else "2\n")


def test_the_environment_script_bears_with_canns_own(tmp_path):
    """CANN's script uses what is not set and commands that fail."""
    (tmp_path / "Ascend/cann").mkdir(parents=True)
    own = "export LIB=/x:$NOT_SET\nfalse\nexport ASCEND_HOME_PATH=/x\n"
    (tmp_path / "Ascend/cann/set_env.sh").write_text(own)
    script = f"set -eu; source {scripts.MODEL}/test/env_npu.sh; env; echo $-; echo $NOT_SET"
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "ASCEND_HOME_PATH=/x" in done.stdout
    assert "TASK_QUEUE_ENABLE=2" in done.stdout
    assert "e" in done.stdout.splitlines()[-1]
    assert done.returncode == 1
    assert "NOT_SET: unbound variable" in done.stderr  # `set -u` is back


def test_calc_fps_as_a_program(trained):
    output, _ = trained
    (path,) = output.glob("*.log.json")
    done = subprocess.run(
        [sys.executable, "-m", "common.fps.calc_fps", path, "2", "2"],
        cwd=scripts.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.match(r"\{'epoch': 1, 'fps': \d+\.\d+\}", done.stdout)
