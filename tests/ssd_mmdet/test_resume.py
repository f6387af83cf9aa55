"""A killed run resumes exactly: processes are really killed, in the middle of an epoch."""

import shutil
import signal

import pytest

from common.errors import UserError
from ssd_mmdet import train
from tests import scripts
from tests.ssd_mmdet import runs

pytestmark = pytest.mark.slow
FLAGS = ("--epochs=3", "--max_iters=8", "--log_interval=1", "--kind=perf", "--save_interval=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco")


def flags(data, output, workers):
    return (*runs.SMALL, *FLAGS, f"--data={data}", f"--output_dir={output}",
            f"--num_workers={workers}")  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """By number of ranks, the folder of a run that nothing happened to (0 workers)."""
    folders = {}

    def folder(ranks):
        if ranks not in folders:
            folders[ranks] = tmp_path_factory.mktemp(f"whole{ranks}") / "run"
            runs.run("train.py", *flags(data, folders[ranks], 0), ranks=ranks)
        return folders[ranks]

    return folder


def assert_equal_runs(one, other):
    assert scripts.losses(one) == scripts.losses(other)
    assert len(scripts.losses(one)) == 8
    scripts.assert_same_state(one / "iter_8.pt", other / "iter_8.pt")


@pytest.mark.parametrize(
    ("ranks", "workers", "step"), [(1, 2, 3), pytest.param(2, 2, 5, marks=pytest.mark.again)]
)
def test_kill_9_and_resume_equals_an_uninterrupted_run(
    data, uninterrupted, tmp_path, ranks, workers, step
):
    output = tmp_path / "run"
    with runs.running("train.py", *flags(data, output, workers), ranks=ranks) as process:
        scripts.wait_for_step(output, step, process)
        scripts.signal_all(process, signal.SIGKILL)
    assert scripts.checkpoints(output)
    assert 8 not in scripts.checkpoints(output)
    logged = scripts.losses(output)
    runs.run("train.py", *flags(data, output, workers), "--resume=auto", ranks=ranks)
    assert "resumed from" in (output / "train_0.log").read_text()
    assert_equal_runs(uninterrupted(ranks), output)
    assert logged.items() <= scripts.losses(output).items()  # repeated steps: the same again


@pytest.mark.again
def test_sigterm_to_2_ranks_with_2_workers_leaves_a_checkpoint_of_that_step(
    data, uninterrupted, tmp_path
):
    output = tmp_path / "run"
    never = (*flags(data, output, 2), "--save_interval=1000")
    with runs.running("train.py", *never, ranks=2) as process:
        scripts.wait_for_step(output, 4, process)
        assert scripts.signal_all(process, signal.SIGTERM) != 0
    (saved,) = scripts.checkpoints(output)
    assert saved == max(scripts.losses(output)) < 8
    runs.run("train.py", *flags(data, output, 2), "--resume=auto", ranks=2)
    assert_equal_runs(uninterrupted(2), output)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "--batch_size=3",
            r"^--resume .*iter_8\.pt: this run differs in global batch \(2 before, 3 now\); .+$",
        ),
        ("--seed=5", r"^--resume .*iter_8\.pt: this run differs in seed \(0 before, 5 now\); .+$"),
        ("--width=0.125", r"^--width 0\.125: .*iter_8\.pt was trained with 0\.0625; omit it$"),
    ],
)
def test_resuming_something_else_is_refused(data, uninterrupted, tmp_path, flag, words):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted(1), output)
    with pytest.raises(UserError, match=words):
        train.main([*flags(data, output, 0), "--resume=auto", flag])
