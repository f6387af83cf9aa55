"""A killed run resumes exactly: processes are really killed, in the middle of an epoch."""

import signal

import pytest

from common.errors import UserError
from fcos import train
from tests.fcos import runs

pytestmark = pytest.mark.slow
FLAGS = ("--batch_size=2", "--epochs=3", "--max_iters=9", "--log_interval=1", "--kind=perf",
         "--save_interval=2")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.subset(tmp_path_factory.mktemp("data") / "coco")


def flags(data, output, workers):
    where = (f"--data={data}", f"--output_dir={output}", f"--num_workers={workers}")
    return (*runs.SHORT, *FLAGS, *where)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The folder of a run of 2 ranks that nothing happened to (0 workers)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.run("train.py", *flags(data, folder, 0), ranks=2)
    return folder


def assert_equal_runs(one, other):
    assert runs.losses(one) == runs.losses(other)
    assert len(runs.losses(one)) == 9
    runs.assert_same_state(one / "iter_9.pt", other / "iter_9.pt")


@pytest.mark.again
def test_kill_9_and_resume_equals_an_uninterrupted_run(data, uninterrupted, tmp_path):
    output = tmp_path / "run"
    with runs.running("train.py", *flags(data, output, 2), ranks=2) as process:
        runs.wait_for_step(output, 5, process)
        runs.signal_all(process, signal.SIGKILL)
    assert runs.checkpoints(output)
    assert 9 not in runs.checkpoints(output)
    logged = runs.losses(output)
    runs.run("train.py", *flags(data, output, 2), "--resume=auto", ranks=2)
    assert "resumed from" in (output / "train_0.log").read_text()
    assert_equal_runs(uninterrupted, output)
    assert logged.items() <= runs.losses(output).items()  # repeated steps: the same again


@pytest.mark.again
def test_sigterm_to_2_ranks_leaves_a_checkpoint_of_that_step(data, uninterrupted, tmp_path):
    output = tmp_path / "run"
    never = (*flags(data, output, 2), "--save_interval=1000")
    with runs.running("train.py", *never, ranks=2) as process:
        runs.wait_for_step(output, 4, process)
        assert runs.signal_all(process, signal.SIGTERM) != 0
    (saved,) = runs.checkpoints(output)
    assert saved == max(runs.losses(output)) < 9
    runs.run("train.py", *flags(data, output, 2), "--resume=auto", ranks=2)
    assert_equal_runs(uninterrupted, output)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--head_norm=none", r"^--head_norm none: .*iter_9\.pt was trained with gn; omit it$"),
        ("--norm_on_bbox", r"^--norm_on_bbox True: .*iter_9\.pt was trained with False; omit it$"),
        (
            "--batch_size=1",
            r"^--resume .*iter_9\.pt: this run differs in global batch \(4 before, 1 now\); .+$",
        ),
    ],
)
def test_resuming_something_else_is_refused(data, uninterrupted, flag, words):
    before = {path.name: path.read_bytes() for path in uninterrupted.glob("*.pt")}
    resume = f"--resume={uninterrupted / 'iter_9.pt'}"
    with pytest.raises(UserError, match=words):
        train.main([*flags(data, uninterrupted, 0), resume, flag])
    assert before == {path.name: path.read_bytes() for path in uninterrupted.glob("*.pt")}
