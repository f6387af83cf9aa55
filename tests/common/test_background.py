import os
import signal
import subprocess
import sys
import time

import pytest

from common.errors import UserError
from common.npu import background
from common.npu.background import BackgroundCall
from tests import scripts

PARENT = """
import sys, time
sys.path.insert(0, {root!r})
from common.npu.background import BackgroundCall
from tests.common.test_background import sleep
call = BackgroundCall("a nap", sleep, 60)
print(call._process.pid, flush=True)
time.sleep(60)
"""


def double(value, log):
    log("doubling")
    log("doubled")
    return 2 * value, os.getpid()


def cores(log):
    return os.sched_getaffinity(0)


def sleep(seconds, log):
    time.sleep(seconds)


def refuse(log):
    raise UserError("no annotations", "give some")


def make_a_mistake(log):
    raise ZeroDivisionError


def kill_itself(log):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_does_the_call_while_the_caller_goes_on():
    call = BackgroundCall("the sum", double, 21)
    assert not call.finished()
    (value, process), lines, error = call.outcome()
    assert call.finished()
    assert (value, lines, error) == (42, ["doubling", "doubled"], None)
    assert process != os.getpid()


def test_the_process_has_all_cores_where_its_caller_is_bound_to_one():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        call = BackgroundCall("the cores", cores)
    finally:
        os.sched_setaffinity(0, before)
    assert call.outcome().value == before


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (refuse, r"^the sum: no annotations; give some$"),
        (make_a_mistake, r"^the sum: its process ended with status 1; a run goes on with --resume"),
        (kill_itself, r"^the sum: its process ended with signal SIGKILL, often because memory is"),
    ],
)
def test_a_failure_is_one_line(function, message):
    with pytest.raises(UserError, match=message) as error:
        BackgroundCall("the sum", function).outcome()
    assert "\n" not in str(error.value)


def test_the_process_ends_with_its_parent():
    program = PARENT.format(root=str(scripts.ROOT))
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    process = int(parent.stdout.readline())
    assert scripts.parent(process) == parent.pid
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    limit = time.monotonic() + 30 * background.SECONDS_BETWEEN_LOOKS
    while scripts.parent(process) is not None:
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_the_signals_of_a_terminal_do_not_reach_the_process():
    call = BackgroundCall("a nap", sleep, 0)
    assert os.getpgid(call._process.pid) == call._process.pid
    call.outcome()
