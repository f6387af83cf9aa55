import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.npu.distributed import Ranks
from common.npu.entry import StopRequest, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture
def _handlers():
    """Gives the signals back as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def status_of(main):
    with pytest.raises(SystemExit) as ended:
        run(main)
    return ended.value.code


def fail(text):
    raise UserError(text)


@pytest.mark.parametrize("status", [None, 0, 3, 143])
def test_the_status_is_mains(status, capsys):
    assert status_of(lambda: status) == status
    assert capsys.readouterr() == ("", "")


def test_a_user_error_is_one_line_and_status_1():
    code = """
from common.npu import entry
from common.errors import UserError

def main():
    raise UserError("a.json: no such file; give another")

entry.run(main)
"""
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 1
    assert made.stdout == ""
    assert made.stderr == "error: a.json: no such file; give another\n"


LOST = (
    "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:10392.",
    "[pair.cc:80] Timed out waiting 20000ms for recv operation to complete",
    "OPS function error: HcclAllreduce, error code is 9\n[Error]: timeout",
)


@pytest.mark.parametrize("text", LOST)
def test_a_lost_rank_is_told_in_one_line(monkeypatch, text):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    status = status_of(lambda: (_ for _ in ()).throw(RuntimeError(text)))
    assert status.startswith("error (rank 2): another rank has ended or does not answer")
    assert status.endswith(f"--resume=auto ({text.splitlines()[0]})")


def test_a_full_disk_and_a_killed_worker_are_told_in_one_line():
    def fail(error):
        raise error

    full = OSError(28, "No space left on device")
    assert status_of(lambda: fail(full)) == "error: No space left on device"
    named = OSError(30, "Read-only file system", "out/tensorboard")
    assert status_of(lambda: fail(named)) == "error: Read-only file system: out/tensorboard"
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    status = status_of(lambda: fail(killed))
    assert status.startswith("error: often because memory or /dev/shm is full; lower --num_workers")
    assert status.endswith("(DataLoader worker (pid 7) is killed by signal: Killed.)")
    assert status_of(lambda: fail(KeyboardInterrupt())) == 130


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="tensor size"):
        run(lambda: torch.ones(2) @ torch.ones(3))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="Connection closed"):
        run(lambda: (_ for _ in ()).throw(RuntimeError(LOST[0])))


def test_a_workers_error_is_the_same_line():
    """A DataLoader raises the worker's exception with its whole traceback as the text."""

    def main():
        try:
            fail("a.jpg: cannot read the image")
        except UserError as error:
            text = "".join(traceback.format_exception(error))
        raise UserError(f"Caught UserError in DataLoader worker process 0.\nOriginal {text}")

    assert status_of(main) == "error: a.jpg: cannot read the image"


def test_of_several_ranks_the_line_names_the_one(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    assert status_of(lambda: fail("bad")) == "error (rank 2): bad"


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def sit_out_sigterm(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("error", [UserError("bad data"), ZeroDivisionError()])
def test_an_error_leaves_no_worker_behind(error):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=sit_out_sigterm, args=(ready,), daemon=True)

    def main():
        worker.start()
        assert ready.wait(20)
        raise error

    with pytest.raises((SystemExit, ZeroDivisionError)):
        run(main)
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_a_request(number, status):
    stop = StopRequest()
    assert not stop.agreed(Ranks())
    os.kill(os.getpid(), number)
    assert stop.agreed(Ranks())
    assert stop.status == status


@pytest.mark.usefixtures("_handlers")
def test_a_second_ctrl_c_does_not_wait():
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.agreed(Ranks())
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("_handlers")
def test_ranks_agree_also_for_another_reason():
    stop = StopRequest()
    assert stop.agreed(Ranks(), also=True)
    assert not stop.agreed(Ranks())
