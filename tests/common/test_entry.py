import multiprocessing
import os
import signal
import time
import traceback

import pytest

from common.npu import entry
from common.npu.distributed import Ranks
from common.npu.entry import StopRequest, run
from common.npu.errors import UserError


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


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3), (143, 143)])
def test_the_status_is_mains(returned, status, capsys):
    assert status_of(lambda: returned) == status
    assert capsys.readouterr() == ("", "")


def test_a_user_error_is_one_line_and_status_1(capsys):
    assert status_of(lambda: fail("a.json: no such file; give another")) == 1
    assert capsys.readouterr() == ("", "error: a.json: no such file; give another\n")


def test_a_workers_error_is_the_same_line(capsys):
    """A DataLoader raises the worker's exception with its whole traceback as the text."""

    def main():
        try:
            fail("a.jpg: cannot read the image")
        except UserError as error:
            text = "".join(traceback.format_exception(error))
        raise UserError(f"Caught UserError in DataLoader worker process 0.\nOriginal {text}")

    assert status_of(main) == 1
    assert capsys.readouterr().err == "error: a.jpg: cannot read the image\n"


def test_ranks_but_the_first_let_it_speak_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for rank in ("0", "2"):
            monkeypatch.setenv("RANK", rank)
            assert status_of(lambda: fail("bad")) == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert len(waited) == 1
    assert capsys.readouterr().err == "error (rank 0): bad\nerror (rank 2): bad\n"


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
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@pytest.mark.usefixtures("_handlers")
def test_ranks_agree_also_for_another_reason():
    stop = StopRequest()
    assert stop.agreed(Ranks(), also=True)
    assert not stop.agreed(Ranks())
