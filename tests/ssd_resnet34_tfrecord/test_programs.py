"""The launch scripts, end to end on records of real images: what they write, and resuming."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from common.errors import UserError
from ssd_resnet34 import ssd_main
from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from ssd_resnet34.tfrecord.evaluate import PORT_NAMES
from tests import scripts

pytestmark = pytest.mark.slow
SHORT = ("--device=cpu", "--recipe=small", "--resnet_checkpoint=", "--amp=O0", "--log_interval=1")
FEW = ("--max_per_class=20", "--eval_batch_size=2")
# The TensorFlow port's own scripts find figures by these.
FPS = re.compile(r"\] FPS: ([\d.]+), learning rate: ([\d.e+-]+), loss: ([\d.]+)")
AP = re.compile(r"\] Current AP: (\d\.\d{5})$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _handlers():
    """A run in this process takes the signals; pytest gets them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Records of 8 training images in 3 files and of 6 validation images in 2, and their JSON."""
    data = scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=8, val=6)
    for split, count in (("train", 3), ("val", 2)):
        annotations = data / f"annotations/instances_{split}2017.json"
        convert(data / f"{split}2017", annotations, data / f"records/{split}2017", count)
    return data


def environment(data):
    """What exec_main.sh would have been edited to say."""
    paths = {"path_to_tfrecord": data / "records", "path_to_annotations": data / "annotations"}
    return scripts.environment() | {name: str(path) for name, path in paths.items()}


def run(script, data, folder, *flags, status=0, **variables):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", scripts.MODEL / script, *SHORT, *FEW, *flags],
        cwd=folder,
        env=environment(data) | variables,
        capture_output=True,
        text=True,
        timeout=400,
    )
    logs = "".join(path.read_text()[-2000:] for path in folder.glob("training/D*/train_*.log"))
    assert done.returncode == status, done.stderr + logs
    return done


@contextmanager
def running(data, folder, *flags):
    """run_npu_1p.sh in `folder`, never left behind."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        ["bash", scripts.MODEL / "run_npu_1p.sh", *SHORT, *flags],
        cwd=folder,
        env=environment(data),
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            scripts.signal_all(process, signal.SIGKILL)


def results(folder):
    """The figures that rank 0 printed, and its detections; takes the log away."""
    log = (folder / "training/D0/train_0.log").read_text()
    (line,) = re.findall(r"\] Eval results: (\{.*\})$", log, re.MULTILINE)
    figures = ast.literal_eval(line)
    assert AP.findall(log) == [f"{figures['COCO/AP']:.5f}"]
    (folder / "training/D0/train_0.log").unlink()
    return figures, json.loads(
        (folder / "training/D0/result_npu/eval/results.bbox.json").read_text()
    )


@pytest.mark.again
def test_eight_ranks_of_the_rank_table(shards, tmp_path):
    done = run("run_npu_8p.sh", shards, tmp_path, "--train_batch_size=1", "--max_iters=2")
    assert done.stderr == ""
    own = []
    for rank in range(8):
        folder = tmp_path / f"training/D{rank}"
        assert (folder / "exec_main.sh").exists()
        log = (folder / f"train_{rank}.log").read_text()
        assert "] global_step...2\n" in log
        ((_, lr, loss),) = FPS.findall(log)  # the first step starts the clock
        assert float(lr) == pytest.approx(0.003 / 4 / 12000, rel=1e-6)
        own.append(loss)
        assert bool(list(folder.glob("result_npu/*.pt"))) == (rank == 0)
    assert len(set(own)) > 1  # of each rank's own batch
    figures, detections = results(tmp_path)
    assert list(figures) == list(PORT_NAMES.values())
    assert list(figures)[:2] + list(figures)[6:9] == [
        "COCO/AP", "COCO/AP50", "COCO/ARmax1", "COCO/ARmax10", "COCO/ARmax100",
    ]  # fmt: skip
    assert detections
    # Evaluation alone, and on one device.
    run("run_npu_1p.sh", shards, tmp_path, "--mode=eval", "--eval_batch_size=4")
    assert results(tmp_path) == (figures, detections)


def test_one_device_stopped_killed_and_resumed(shards, tmp_path):
    flags = ("--train_batch_size=2", "--max_iters=8", "--save_interval=2", "--clip_norm=10")
    learning = ("--lr=0.5", "--num_examples_per_epoch=12", "--mode=train")
    whole = tmp_path / "whole"
    run("run_npu_1p.sh", shards, whole, *flags, *learning[:2], "--num_workers=0")
    expected = results(whole)
    assert len(FPS.findall((whole / "training/D0/result_npu/train_0.log").read_text())) == 0
    broken = tmp_path / "broken"
    output = broken / "training/D0/result_npu"
    with running(shards, broken, *flags, *learning, "--num_workers=1") as process:
        scripts.wait_for_step(output, 1, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    (stopped,) = scripts.checkpoints(output)
    assert stopped == max(scripts.losses(output)) < 8
    with running(shards, broken, *flags, *learning, "--num_workers=1") as process:
        scripts.wait_for_step(output, max(4, stopped + 1), process)
        scripts.signal_all(process, signal.SIGKILL)
    assert 8 not in scripts.checkpoints(output)
    # The rest, with the evaluation that the run was to end in.
    run("run_npu_1p.sh", shards, broken, *flags, *learning[:2], "--num_workers=2")
    assert "resumed from" in (broken / "training/D0/train_0.log").read_text()
    ours, theirs = output, whole / "training/D0/result_npu"
    assert scripts.losses(ours) == scripts.losses(theirs)
    assert len(scripts.losses(ours)) == 8
    scripts.assert_same_state(ours / "iter_8.pt", theirs / "iter_8.pt")
    assert results(broken) == expected
    # A finished run goes straight to its evaluation.
    run("run_npu_1p.sh", shards, broken, *flags, *learning[:2])
    assert "] FPS" not in (broken / "training/D0/train_0.log").read_text()
    assert results(broken) == expected
    # What does not fit is refused.
    pattern = f"--training_file_pattern={shards}/records/train2017*"
    again = (*SHORT, *flags, *learning, pattern, f"--model_dir={output}", "--seed=1")
    with pytest.raises(
        UserError, match=r"seed \(0 before, 1 now\); go on as it was, or .*--model_dir"
    ):
        ssd_main.main(again)


def test_a_rank_that_dies_ends_the_run(shards, tmp_path):
    table = json.loads((scripts.MODEL / "npu_config/8p.json").read_text())
    group = table["group_list"][0]
    group["instance_list"] = group["instance_list"][:2]
    group.update(device_num="2", instance_count="2")
    (tmp_path / "2p.json").write_text(json.dumps(table))
    process = subprocess.Popen(
        ["bash", scripts.MODEL / "run_npu_8p.sh", *SHORT, "--train_batch_size=2", "--mode=train"],
        cwd=tmp_path,
        env=environment(shards) | {"RANK_TABLE_FILE": "2p.json", "HCCL_RANK_TABLE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        scripts.wait_for_step(tmp_path / "training/D0/result_npu", 1, process)
        everyone = scripts.family(process.pid)
        os.kill(scripts.children(process.pid)[1], signal.SIGKILL)
        assert scripts.ended(process, everyone) != 0
    finally:
        scripts.signal_all(process, signal.SIGKILL)
    assert "another rank has ended" in process.stderr.read()
    version = json.loads((tmp_path / "training/rank_table.json").read_text())
    assert version["version"] == "1.0"


def test_bad_input_ends_the_script_with_its_line(shards, golden_dir, tmp_path):
    pattern = f"--training_file_pattern={golden_dir}/corrupt/payload_flip.tfrecord"
    done = run("run_npu_1p.sh", shards, tmp_path, pattern, "--train_batch_size=2", status=1)
    file = r"payload_flip\.tfrecord: record at byte 63151: wrong checksum of the content"
    (line,) = done.stderr.splitlines()
    assert re.match(rf"error: .*{file}", line)
    shutil.copy(scripts.MODEL / "npu_config/8p.json", tmp_path / "table.json")
    table = (tmp_path / "table.json").read_text().replace('"rank_id": "3"', '"rank_id": "2"')
    (tmp_path / "table.json").write_text(table)
    done = run("run_npu_8p.sh", shards, tmp_path, RANK_TABLE_FILE="table.json", status=1)
    assert done.stderr == ("error: table.json: rank_id 2 comes 2 times; correct the rank table\n")


def test_check_data_names_every_bad_record(shards, golden_dir):
    bad = f"--training_file_pattern={golden_dir}/corrupt/payload_flip.tfrecord"
    good = f"--validation_file_pattern={shards}/records/val2017*"
    command = [sys.executable, scripts.MODEL / "ssd_main.py", "--check_data", bad, good]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "payload_flip.tfrecord: record at byte 63151: wrong checksum" in done.stderr
    assert "1 errors" in done.stdout
    assert "--validation_file_pattern: 6 records" in done.stdout
