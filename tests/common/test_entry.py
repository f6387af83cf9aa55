import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

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


CUDA_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."
NPU_FULL = "NPU out of memory. Tried to allocate 5.03 GiB (NPU 3; 60.96 GiB total capacity)"
CPU_FULL = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
)
IN_WORKER = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  at x.py\n"
DEVICE = "the memory of the device is full; lower --batch_size (in evaluation --eval_batch_size)"
HOST = "the memory of the host is full; lower --num_workers or --batch_size"


@pytest.mark.parametrize(
    ("error", "beginning", "end"),
    [
        (torch.OutOfMemoryError(CUDA_FULL), DEVICE, f"({CUDA_FULL})"),
        (RuntimeError(NPU_FULL + "\n[ERROR] 2026-01-01"), DEVICE, f"({NPU_FULL})"),
        (RuntimeError("CUDA error: out of memory\nCompile with"), DEVICE, "of memory)"),
        (RuntimeError(CPU_FULL), HOST, f"({CPU_FULL})"),
        (RuntimeError(f"{IN_WORKER}RuntimeError: {CPU_FULL}"), HOST, f"(RuntimeError: {CPU_FULL})"),
        (MemoryError(), HOST, "(in evaluation --eval_batch_size)"),
        (MemoryError("Unable to allocate 9 TiB"), HOST, "(Unable to allocate 9 TiB)"),
        (OSError(12, "Cannot allocate memory"), f"Cannot allocate memory: {HOST}", ""),
        (
            OSError(24, "Too many open files", "a.jpg"),
            "Too many open files: a.jpg: raise the limit with `ulimit -n 65536`",
            "",
        ),
        (
            RuntimeError(
                "unable to open shared memory object </torch_1>: Too many open files (24)"
            ),
            "too many open files; raise the limit with `ulimit -n 65536`",
            "(24))",
        ),
        (
            EOFError("Caught EOFError in pin memory thread for device 0."),
            "a loader worker has closed its connection, often because too many files are open; "
            "raise the limit with `ulimit -n 65536`, or lower --num_workers; a run goes on",
            "",
        ),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe: a process that reads this one's", ""),
        (OSError(5, "Input/output error"), "Input/output error: a terminal was closed, or", ""),
        (OSError(f"{IN_WORKER}OSError: [Errno 5] I/O error"), "OSError: [Errno 5] I/O error", ""),
    ],
)
def test_what_the_machine_lacks_is_told_in_one_line_with_the_remedy(error, beginning, end):
    def main():
        raise error

    status = status_of(main)
    assert status.startswith(f"error: {beginning}")
    assert status.endswith(end)
    assert "\n" not in status


def test_a_real_allocation_that_is_too_large_is_told_in_one_line():
    status = status_of(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert status.startswith(f"error: {HOST}")


def test_a_mistake_in_a_worker_keeps_its_traceback():
    def main():
        raise RuntimeError(f"{IN_WORKER}RuntimeError: shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run(main)


@pytest.mark.parametrize("version", ["2.5.1+cu121", "1.13.0", "2.2.0a0+git1"])
def test_an_old_torch_is_told_before_anything_else(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    status = status_of(lambda: pytest.fail("started"))
    assert status.startswith(
        f"error: torch {version} is too old: 2.6 is the oldest that works; pip"
    )


@pytest.mark.parametrize("version", ["2.6.0a0+ecf3bae40a", "2.13.0", "3.0"])
def test_a_torch_that_is_new_enough_starts(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert status_of(lambda: 7) == 7


def test_a_full_disk_and_a_killed_worker_are_told_in_one_line():
    def fail(error):
        raise error

    full = OSError(28, "No space left on device")
    remedy = "free space on that disk, or on the one that the output is redirected to"
    assert status_of(lambda: fail(full)) == f"error: No space left on device: {remedy}"
    named = OSError(30, "Read-only file system", "out/tensorboard")
    assert status_of(lambda: fail(named)) == "error: Read-only file system: out/tensorboard"
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    status = status_of(lambda: fail(killed))
    assert status.startswith(
        "error: a loader worker has ended, often because memory or /dev/shm is full; lower "
        "--num_workers; a run goes on with --resume=auto "
    )
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


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_is_a_request(number, status):
    stop = StopRequest()
    assert not stop.agreed(Ranks())
    os.kill(os.getpid(), number)
    assert stop.agreed(Ranks())
    assert stop.status == status


def test_a_second_ctrl_c_does_not_wait():
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.agreed(Ranks())
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_ranks_agree_also_for_another_reason():
    stop = StopRequest()
    assert stop.agreed(Ranks(), also=True)
    assert not stop.agreed(Ranks())


def test_a_program_started_by_nohup_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.agreed(Ranks())


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, 4096),
        (1024, 10**9, 65536),
        (1024, resource.RLIM_INFINITY, 65536),
        (100_000, 10**9, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
        (256, 256, None),
    ],
)
def test_the_limit_of_open_files_is_raised(monkeypatch, soft, hard, expected):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits))
    status_of(lambda: 0)
    assert raised == ([] if expected is None else [(expected, hard)])


@pytest.mark.parametrize("closed", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_stream_that_was_closed_at_the_start_goes_nowhere(monkeypatch, closed):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    opened = []

    def main():
        print("a line")
        print("a warning \udcca", file=sys.stderr)
        for _ in tqdm(range(2), disable=False):
            opened.append([getattr(sys, name).name for name in closed])

    assert status_of(main) is None
    assert opened == [[os.devnull] * len(closed)] * 2
    for name in closed:
        getattr(sys, name).close()


def test_a_user_error_leaves_the_process_group(tmp_path):
    """Else gloo's threads abort one process in four whose last act was a collective."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert status_of(lambda: fail("bad")) == "error: bad"
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
