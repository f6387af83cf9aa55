"""A killed run resumes exactly: processes are really killed, in the middle of an epoch.

10 images at batch 2 make epochs of 5 steps (2 ranks: 3); every run takes 9 steps, and the kill
falls between two checkpoints, so that steps are repeated as well.
"""

import shutil
import signal

import pytest

from tests.ssd_resnet34 import scripts

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


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2)])
def test_kill_9_and_resume_equals_an_uninterrupted_run(
    data, uninterrupted, tmp_path, ranks, workers
):
    output = tmp_path / "run"
    process = scripts.start("train.py", *flags(data, output, workers), ranks=ranks)
    scripts.wait_for_step(output, 3 + workers, process)
    scripts.kill_group(process)
    assert scripts.checkpoints(output)
    assert 9 not in scripts.checkpoints(output)
    scripts.run("train.py", *flags(data, output, workers), "--resume=auto", ranks=ranks)
    assert "resumed from" in (output / "train_0.log").read_text()
    assert_equal_runs(uninterrupted(ranks), output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_a_checkpoint_of_that_step(
    data, uninterrupted, tmp_path, number
):
    output = tmp_path / "run"
    never = (*flags(data, output, 2), "--save_interval=1000")
    process = scripts.start("train.py", *never, ranks=2)
    scripts.wait_for_step(output, 4, process)
    assert scripts.kill_group(process, number) != 0
    (saved,) = scripts.checkpoints(output)
    assert saved == max(scripts.losses(output))
    scripts.run("train.py", *flags(data, output, 2), "--resume=auto", ranks=2)
    assert_equal_runs(uninterrupted(2), output)


def test_sigterm_to_one_process_ends_it_with_143(data, tmp_path):
    output = tmp_path / "run"
    process = scripts.start("train.py", *flags(data, output, 1), "--save_interval=1000")
    scripts.wait_for_step(output, 2, process)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert scripts.checkpoints(output) == [max(scripts.losses(output))]


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
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipping checkpoint")]
    assert ["iter_12.pt" in skipped[0], "iter_11.pt" in skipped[1]] == [True, True]
    assert "iter_8.pt at iteration 8" in done.stdout
    scripts.assert_same_state(uninterrupted(1) / "iter_9.pt", output / "iter_9.pt")


def test_resuming_something_else_is_refused(data, uninterrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted(1), output)
    for flag, word in (("--batch_size=3", "global batch"), ("--seed=5", "seed")):
        done = scripts.run("train.py", *flags(data, output, 0), "--resume=auto", flag, status=1)
        assert done.stderr.splitlines()[-1].startswith("error: --resume")
        assert word in done.stderr.splitlines()[-1]
