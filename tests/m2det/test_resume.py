"""A killed run resumes exactly: processes are really killed, in the middle of an epoch.

20 images at batch 4 make epochs of 5 steps; every run takes 8 steps, and the kill falls between
two checkpoints, so that steps are repeated as well.
"""

import signal

import pytest

from common.errors import UserError
from m2det import train
from tests import scripts

pytestmark = pytest.mark.slow
FLAGS = (
    *("--recipe=quickstart", "--device=cpu", "--amp=O0", "--augment", "--epochs=3", "--kind=perf"),
    *("--max_iters=8", "--log_interval=1", "--save_interval=2"),
)


@pytest.fixture(scope="module", autouse=True)
def _own_scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "MODEL", scripts.ROOT / "m2det")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=20)


def flags(data, output, workers, ranks):
    where = (f"--data={data}", f"--output_dir={output}", f"--num_workers={workers}")
    return *FLAGS, *where, f"--batch_size={4 // ranks}"


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The folder of a run on 2 ranks that nothing happened to (0 workers)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    scripts.run("train.py", *flags(data, folder, 0, 2), ranks=2)
    return folder


def assert_equal_runs(one, other):
    assert scripts.losses(one) == scripts.losses(other)
    assert len(scripts.losses(one)) == 8
    scripts.assert_same_state(one / "iter_8.pt", other / "iter_8.pt")


@pytest.mark.again
def test_kill_9_and_resume_equals_an_uninterrupted_run(data, uninterrupted, tmp_path):
    output = tmp_path / "run"
    with scripts.running("train.py", *flags(data, output, 2, 2), ranks=2) as process:
        scripts.wait_for_step(output, 5, process, seconds=300)
        scripts.signal_all(process, signal.SIGKILL)
    assert 8 not in scripts.checkpoints(output)
    scripts.run("train.py", *flags(data, output, 2, 2), "--resume=auto", ranks=2)
    assert "resumed from" in (output / "train_0.log").read_text()
    assert_equal_runs(uninterrupted, output)


@pytest.mark.again
def test_sigterm_to_2_ranks_with_2_workers_leaves_a_checkpoint_of_that_step(
    data, uninterrupted, tmp_path
):
    output = tmp_path / "run"
    never = (*flags(data, output, 2, 2), "--save_interval=1000")
    with scripts.running("train.py", *never, ranks=2) as process:
        scripts.wait_for_step(output, 3, process, seconds=300)
        assert scripts.signal_all(process, signal.SIGTERM) != 0
    (saved,) = scripts.checkpoints(output)
    assert saved == max(scripts.losses(output)) < 8
    scripts.run("train.py", *flags(data, output, 2, 2), "--resume=auto", ranks=2)
    assert_equal_runs(uninterrupted, output)


def test_a_resumed_run_keeps_its_network(data, tmp_path):
    output = tmp_path / "run"
    one_step = (*flags(data, output, 0, 1), "--max_iters=1", "--save_interval=1")
    scripts.run("train.py", *one_step)
    other = (*one_step, "--resume=auto", "--recipe=512_vgg")
    done = scripts.run("train.py", *other)
    assert "its network is trained: " in done.stdout
    assert "image_size 320 instead of 512" in done.stdout
    with pytest.raises(
        UserError, match=r"--backbone vgg16: .*iter_1\.pt was trained with vgg16_thin"
    ):
        train.main([*other, "--backbone=vgg16"])
