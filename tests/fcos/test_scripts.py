"""The launch scripts, end to end on real images."""

import json
import os
import re
import shutil
import subprocess
from contextlib import ExitStack

import pytest
import torch

from common.coco.index import COCO_CLASSES
from common.npu import checkpoint
from fcos.config import RECIPES
from fcos.model import build_model
from tests.fcos import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.subset(tmp_path_factory.mktemp("data") / "coco", train=16, val=4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run of train_full_8p.sh with 2 processes, and what it printed."""
    output = tmp_path_factory.mktemp("trained") / "8"
    flags = (f"--data_path={data}", f"--output_dir={output}", "--nproc_per_node=2")
    done = runs.run("train_full_8p.sh", *flags, *runs.SHORT, "--max_iters=4")
    return output, done.stdout


def test_full_training_leaves_every_file(trained):
    output, said = trained
    name, values = runs.summary(output, "acc")
    assert name == "FCOS_bs2_2p_acc.log"
    assert {"TrainAccuracy", "ActualFPS", "ActualLoss", "E2ETrainingTime"} <= set(values)
    pictures = ("curves.png", "detections.png", "pr_curves.png", "confusion.png", "errors.png")
    for file in (*pictures, "analysis.json", "results.bbox.json", "best.pt"):
        assert (output / file).stat().st_size > 0, file
    assert runs.checkpoints(output) == [4]
    log = (output / "train_2.log").read_text()
    for words in (
        "base learning rate 0.0025",
        "weights: random: nothing is frozen, batch norm trains",
        "loss_centerness: ",
        ", grad_norm: ",
        "Epoch(val) [1][",
    ):
        assert words in log, words
    assert "Final Train Accuracy : " in said


def test_evaluation_of_the_newest_checkpoint(trained, data):
    output, _ = trained
    where = (f"--data_path={data}", "--nproc_per_node=2", "--device=cpu", "--num_workers=0")
    more = (f"--output_dir={output}", "--img_scale=64,107")
    newest = runs.run("train_eval_8p.sh", *where, *more)
    assert "iter_4.pt" in newest.stdout
    accuracy = runs.summary(output, "acc")[1]["TrainAccuracy"]
    assert runs.summary(output, "eval")[1]["TrainAccuracy"] == accuracy


def test_the_evaluation_script_of_the_port_with_mmdetections_checkpoint(data, tmp_path):
    """A runner's file of the whole network, as the model zoo has it."""
    torch.manual_seed(0)
    model = build_model(RECIPES["tricks"], 80)
    state = {"meta": {"epoch": 24, "CLASSES": COCO_CLASSES}, "state_dict": model.state_dict()}
    torch.save(state, tmp_path / "epoch_24.pth")
    script = runs.MODEL / "scripts" / "eval.sh"
    flags = (f"--data_path={data}", f"--output_dir={tmp_path}", "--device=cpu")
    more = (f"--checkpoint_path={tmp_path}/epoch_24.pth", "--img_scale=64,107", "--num_workers=0")
    done = runs.run(str(script), *flags, *more)
    assert "has the head of --recipe=tricks, which is taken" in done.stdout
    assert "377 tensors loaded\n" in done.stdout
    assert "Average Precision" in done.stdout


def test_performance_on_one_device_with_another_recipe(data, tmp_path):
    output = tmp_path / "0"
    where = (f"--data_path={data}", f"--output_dir={output}")
    more = ("--batch_size=4", "--recipe=tricks", "--max_iters=2", "--shapes=exact")
    runs.run("train_performance_1p.sh", *where, *runs.SHORT, *more)
    name, values = runs.summary(output, "perf")
    assert name == "FCOS_bs4_1p_perf.log"
    assert "TrainAccuracy" not in values
    header = json.loads(next(output.glob("*.log.json")).read_text().splitlines()[0])
    assert "box_loss = 'giou'" in header["config"]
    assert "img_scale = ('64,107',)" in header["config"]
    assert "grad_norm" not in (output / "train_0.log").read_text()  # tricks does not clip


@pytest.mark.again
def test_8_processes(data, tmp_path):
    where = (f"--data_path={data}", f"--output_dir={tmp_path}/8")
    flags = (*runs.SHORT, "--batch_size=1", "--max_iters=2", "--recipe=nogn")
    runs.run("train_performance_8p.sh", *where, *flags)
    assert runs.summary(tmp_path / "8", "perf")[1]["RankSize"] == "8"
    assert runs.checkpoints(tmp_path / "8") == [2]


def test_finetuning_on_own_classes(trained, tmp_path):
    output, _ = trained
    data = runs.subset(tmp_path / "own", train=4, val=2, classes=["cat", "hat", "bat"])
    where = (f"--data_path={data}", f"--output_dir={tmp_path}/run")
    shutil.copytree(output, tmp_path / "run")
    flags = (f"--checkpoint_path={tmp_path}/run/best.pt", "--batch_size=2", "--max_iters=2")
    done = runs.run("train_finetune_1p.sh", *where, *runs.SHORT, *flags)
    assert "1 classes of the same name keep their weights: cat" in done.stdout
    assert "2 initialised anew: hat, bat" in done.stdout
    assert "3 classes" in done.stdout
    before, after = (
        checkpoint.load(folder)["model"]
        for folder in (output / "best.pt", tmp_path / "run" / "iter_2.pt")
    )
    # Weights given: stem, C2 and every batch norm are as they were, the rest is not.
    for key in ("backbone.layer1.0.conv2.weight", "backbone.layer4.0.bn2.running_mean"):
        assert torch.equal(before[key], after[key])
    assert not torch.equal(
        before["backbone.layer2.0.conv2.weight"], after["backbone.layer2.0.conv2.weight"]
    )


def test_data_path_is_asked_for():
    done = runs.run("train_full_1p.sh", status=1)
    assert done.stderr.startswith("error: give the folder of the data set with --data_path=DIR")
    assert '[Error] para "data_path" must be confing' in done.stderr


NET = ("--nproc_per_node=1", "--nnodes=2", "--master_addr=10.77.0.1", "--master_port=23333")


@pytest.mark.again
def test_two_nodes_are_two_processes_of_one(two_hosts, data, tmp_path):
    flags = (f"--data_path={data}", *runs.SHORT, "--max_iters=3", "--log_interval=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        nodes = []
        for node, host in enumerate(two_hosts):
            own = (f"--node_rank={node}", f"--local_addr=10.77.0.{node + 1}")
            script = runs.place("train_performance_multinodes.sh")
            command = ["ip", "netns", "exec", host, "bash", script, *flags, *NET, *own]
            process = stack.enter_context(
                subprocess.Popen(
                    [*command, f"--output_dir={tmp_path}/{node}"],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            nodes.append(process)
        for process in nodes:
            _, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors[-3000:]
    assert runs.summary(tmp_path / "0", "perf")[1]["RankSize"] == "2"
    assert not list(tmp_path.glob("1/iter_*.pt"))
    one_host = tmp_path / "one"
    more = ("--nproc_per_node=2", f"--output_dir={one_host}")
    runs.run("train_performance_8p.sh", *flags, *more)
    assert len(runs.losses(one_host)) == 3
    for step, expected in runs.losses(one_host).items():
        assert runs.losses(tmp_path / "0")[step] == pytest.approx(expected, rel=1e-6)


def test_the_recipes_named_in_the_readme_exist():
    text = (runs.MODEL / "README.md").read_text()
    for name in RECIPES:
        assert re.search(rf"`{name}`", text), name
