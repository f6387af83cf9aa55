import os
import signal
import threading
import time

import pytest
import torch

from common.errors import UserError
from common.npu import overlap
from common.npu.device import many_shapes
from common.npu.overlap import MOST_UNFINISHED, HostCopy, HostWork

CPU = torch.device("cpu")


@pytest.fixture
def _accelerator(monkeypatch):
    """Makes the CPU work as an accelerator does, with a thread for the host's part."""
    monkeypatch.setattr(overlap, "in_host_memory", lambda device: False)


def do(calls):
    """Have the calls, each a function and its arguments, done beside the device's work."""
    with HostWork(CPU) as host_work:
        for call in calls:
            host_work.add(*call)
        return host_work.results()


def slow_square(number):
    time.sleep(0.01 if number % 2 else 0)
    return number * number


def test_on_a_cpu_each_call_is_done_at_once():
    assert do([(threading.get_ident,)] * 3) == [threading.get_ident()] * 3


@pytest.mark.usefixtures("_accelerator")
def test_a_thread_does_the_calls_in_their_order():
    calls = [(slow_square, number) for number in range(7)]
    *squares, thread = do([*calls, (threading.get_ident,)])
    assert squares == [number * number for number in range(7)]
    assert thread != threading.get_ident()
    assert thread not in [alive.ident for alive in threading.enumerate()]


@pytest.mark.usefixtures("_accelerator")
def test_the_thread_has_all_cores_where_its_caller_is_bound_to_one():
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread
    try:
        assert do([(os.sched_getaffinity, 0)]) == [cores]
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("_accelerator")
def test_the_caller_goes_on_but_not_too_far():
    may_end = threading.Semaphore(0)
    released = []

    def let_one_end():
        released.append(True)
        may_end.release()

    with HostWork(CPU) as host_work:
        for _ in range(MOST_UNFINISHED):
            host_work.add(may_end.acquire)  # returns, although none has ended
        threading.Timer(0.05, let_one_end).start()
        host_work.add(may_end.acquire)  # one too many: returns when the first has ended
        assert released
        may_end.release(MOST_UNFINISHED)
        assert host_work.results() == [True] * (MOST_UNFINISHED + 1)


@pytest.mark.usefixtures("_accelerator")
def test_an_error_in_the_thread_is_raised_as_it_is_and_ends_the_work():
    done = []

    def fail():
        time.sleep(0.01)
        raise UserError("the detections are wrong", "train longer")

    later = [(done.append, number) for number in range(1, 100)]
    with pytest.raises(UserError, match=r"^the detections are wrong; train longer$"):
        do([(done.append, 0), (fail,), *later])
    assert 0 in done
    assert len(done) <= 1 + MOST_UNFINISHED


@pytest.mark.usefixtures("_accelerator")
def test_an_error_of_the_last_call_is_raised_with_the_results():
    with pytest.raises(ValueError, match="none"):
        do([(int, "none")])


@pytest.mark.usefixtures("_accelerator")
def test_ctrl_c_ends_the_work():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    squares = []
    later = [(lambda number: squares.append(slow_square(number)), number) for number in range(100)]
    with pytest.raises(KeyboardInterrupt):
        do([(signal.raise_signal, signal.SIGINT), *later])
    assert len(squares) < 100


def test_a_copy_is_issued_at_once_and_read_when_it_is_there(monkeypatch):
    events = []

    class Event:
        def synchronize(self):
            events.append("waited")

    def record_event(device):
        events.append(f"issued on {device}")
        return Event()

    monkeypatch.setattr(overlap, "record_event", record_event)
    copy = HostCopy(torch.arange(3))
    assert events == ["issued on cpu"]
    assert copy.wait().tolist() == [0, 1, 2]
    assert events == ["issued on cpu", "waited"]


@pytest.mark.parametrize("benchmark", [True, False])
def test_kernels_are_not_timed_where_shapes_are_many(monkeypatch, benchmark):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    with many_shapes():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == benchmark
    with pytest.raises(ZeroDivisionError), many_shapes():
        1 / 0  # noqa: B018
    assert torch.backends.cudnn.benchmark == benchmark
