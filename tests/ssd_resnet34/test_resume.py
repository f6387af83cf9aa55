"""A killed run resumes exactly: processes are really killed, in the middle of an epoch.

10 images at batch 2 make epochs of 5 steps (2 ranks: 3); every run takes 9 steps, and the kill
falls between two checkpoints, so that steps are repeated as well.
"""

import os
import shutil
import signal

import pytest
import torch

from common.errors import UserError
from ssd_resnet34 import train
from tests import scripts

pytestmark = pytest.mark.slow
FLAGS = ("--epochs=3", "--max_iters=9", "--log_interval=1", "--kind=perf", "--save_interval=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco")


def flags(data, output, workers):
    return (*scripts.SMALL, *FLAGS, f"--data={data}", f"--output_dir={output}",
            f"--num_workers={workers}")  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """By number of ranks, the folder of a run that nothing happened to (0 workers)."""
    folders = {}

    def folder(ranks):
        if ranks not in folders:
            folders[ranks] = tmp_path_factory.mktemp(f"whole{ranks}") / "run"
            scripts.run("train.py", *flags(data, folders[ranks], 0), ranks=ranks)
        return folders[ranks]

    return folder


def assert_equal_runs(one, other):
    assert scripts.losses(one) == scripts.losses(other)
    assert len(scripts.losses(one)) == 9
    scripts.assert_same_state(one / "iter_9.pt", other / "iter_9.pt")


@pytest.mark.parametrize(
    ("ranks", "workers", "step"),
    [
        (1, 0, 3),
        pytest.param(1, 1, 4, marks=pytest.mark.again),
        pytest.param(1, 2, 6, marks=pytest.mark.again),
        pytest.param(2, 0, 3, marks=pytest.mark.again),
        (2, 1, 5),
    ],
)
def test_kill_9_and_resume_equals_an_uninterrupted_run(
    data, uninterrupted, tmp_path, ranks, workers, step
):
    output = tmp_path / "run"
    with scripts.running("train.py", *flags(data, output, workers), ranks=ranks) as process:
        scripts.wait_for_step(output, step, process)
        scripts.signal_all(process, signal.SIGKILL)
    assert scripts.checkpoints(output)
    assert 9 not in scripts.checkpoints(output)
    logged = scripts.losses(output)
    scripts.run("train.py", *flags(data, output, workers), "--resume=auto", ranks=ranks)
    assert "resumed from" in (output / "train_0.log").read_text()
    assert_equal_runs(uninterrupted(ranks), output)
    assert logged.items() <= scripts.losses(output).items()  # repeated steps: the same again


@pytest.mark.again
def test_a_run_killed_in_an_evaluation_repeats_it(data, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "killed"
    more = ("--kind=acc", "--evaluation=1", "--max_iters=7", "--save_interval=1000")
    scripts.run("train.py", *flags(data, whole, 0), *more, ranks=2)
    with scripts.running("train.py", *flags(data, output, 0), *more, ranks=2) as process:
        scripts.wait_for_text(output, "evaluating 4 images", process)
        scripts.signal_all(process, signal.SIGKILL)
    assert scripts.checkpoints(output) == [3]  # of the first epoch's end
    scripts.run("train.py", *flags(data, output, 0), *more, "--resume=auto", ranks=2)
    for run in (whole, output):
        scored = [line["epoch"] for line in scripts.json_lines(run) if line.get("mode") == "val"]
        assert scored == [1, 3]
    scripts.assert_same_state(whole / "iter_7.pt", output / "iter_7.pt")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.again)])
def test_averaged_weights_of_a_killed_run_are_those_of_an_uninterrupted_one(data, tmp_path, ranks):
    """They are evaluated after the first epoch, which averages their statistics over the ranks."""
    whole, output = tmp_path / "whole", tmp_path / "killed"
    more = ("--ema=0.9", "--kind=acc", "--evaluation=1")
    scripts.run("train.py", *flags(data, whole, 0), *more, ranks=ranks)
    with scripts.running("train.py", *flags(data, output, 0), *more, ranks=ranks) as process:
        scripts.wait_for_step(output, 7, process)
        scripts.signal_all(process, signal.SIGKILL)
    assert 9 not in scripts.checkpoints(output)
    scripts.run("train.py", *flags(data, output, 0), *more, "--resume=auto", ranks=ranks)
    assert_equal_runs(whole, output)
    state = torch.load(output / "iter_9.pt", weights_only=True)
    assert state["ema"]["updates"] == 9
    assert len(state["ema"]["buffers"]) == ranks


@pytest.mark.again
def test_means_over_steps_before_and_after_a_resume_are_the_same_on_2_ranks(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=24)
    one, other = tmp_path / "one", tmp_path / "other"
    # Log lines after steps 3 and 6, a checkpoint after step 4.
    more = ("--max_iters=6", "--log_interval=3", "--save_interval=4")
    scripts.run("train.py", *flags(data, one, 0), *more, ranks=2)
    shutil.copytree(one, other)
    (other / "iter_6.pt").unlink()
    next(other.glob("*.log.json")).unlink()
    done = scripts.run("train.py", *flags(data, other, 0), *more, "--resume=auto", ranks=2)
    assert "iter_4.pt at iteration 4" in done.stdout
    assert scripts.losses(other) == {6: scripts.losses(one)[6]}
    scripts.assert_same_state(one / "iter_6.pt", other / "iter_6.pt")


@pytest.mark.parametrize(
    ("send", "number", "status"),
    [
        pytest.param(scripts.signal_all, signal.SIGTERM, 143, id="SIGTERM to all processes"),
        pytest.param(
            scripts.signal_group, signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.again
        ),
    ],
)
def test_a_signal_to_2_ranks_leaves_a_checkpoint_of_that_step(
    data, uninterrupted, tmp_path, send, number, status
):
    output = tmp_path / "run"
    never = (*flags(data, output, 2), "--save_interval=1000")
    errors = tmp_path / "stderr"
    with (
        errors.open("w") as stderr,
        scripts.running("train.py", *never, ranks=2, stderr=stderr) as process,
    ):
        scripts.wait_for_step(output, 4, process)
        assert send(process, number) == status
    assert errors.read_text() == f"stopped by {signal.Signals(number).name}\n"
    (saved,) = scripts.checkpoints(output)
    assert saved == max(scripts.losses(output)) < 9
    scripts.run("train.py", *flags(data, output, 2), "--resume=auto", ranks=2)
    assert_equal_runs(uninterrupted(2), output)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.again),
    ],
    ids=["SIGTERM", "Ctrl-C", "lost terminal"],
)
def test_a_signal_to_process_and_workers_gives_its_status(data, tmp_path, number, status):
    """Also where nobody reads the output: Ctrl-C ends the `tee` behind a pipe as well."""
    output = tmp_path / "run"
    flags_of_run = (*flags(data, output, 1), "--save_interval=1000")
    reader, writer = os.pipe()
    with scripts.running("train.py", *flags_of_run, stdout=writer) as process:
        os.close(writer)
        assert b"device: cpu" in os.read(reader, 1000)
        os.close(reader)
        scripts.wait_for_step(output, 2, process)
        assert scripts.signal_group(process, number) == status
    assert scripts.checkpoints(output) == [max(scripts.losses(output))]
    assert max(scripts.losses(output)) < 9


def test_damaged_checkpoints_are_skipped_with_a_line(data, uninterrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted(1), output)
    whole = (output / "iter_8.pt").read_bytes()
    (output / "iter_11.pt").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (output / "iter_12.pt").write_bytes(flipped)
    (output / "iter_9.pt").unlink()
    done = scripts.run("train.py", *flags(data, output, 0), "--resume=auto")
    skipped = [line for line in done.stdout.splitlines() if "skipping checkpoint" in line]
    assert ["iter_12.pt" in skipped[0], "iter_11.pt" in skipped[1]] == [True, True]
    assert "iter_8.pt at iteration 8" in done.stdout
    scripts.assert_same_state(uninterrupted(1) / "iter_9.pt", output / "iter_9.pt")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "--batch_size=3",
            r"^--resume .*iter_9\.pt: this run differs in global batch \(2 before, 3 now\); .+$",
        ),
        ("--seed=5", r"^--resume .*iter_9\.pt: this run differs in seed \(0 before, 5 now\); .+$"),
        ("--backbone=resnet18", r"^--backbone resnet18: .*iter_9\.pt was trained with resnet10;"),
        (
            None,
            r"^--resume .*iter_9\.pt: .* in training images \(10 before, 8 now\), .+; .+$",
        ),
    ],
)
def test_resuming_something_else_is_refused(data, uninterrupted, tmp_path, flag, words):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted(1), output)
    before = {path.name: path.read_bytes() for path in output.glob("*.pt")}
    flag = flag or f"--data={scripts.subset(tmp_path / 'other', train=8, val=2)}"
    with pytest.raises(UserError, match=words):
        train.main([*flags(data, output, 0), "--resume=auto", flag])
    assert before == {path.name: path.read_bytes() for path in output.glob("*.pt")}
