"""What every entry script does around its work: errors in one line, a stop at the next step."""

import errno
import gc
import multiprocessing
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from textwrap import shorten
from typing import NamedTuple

import torch
import torch.distributed as dist

from common.errors import UserError, one_line
from common.files import MORE_FILES, OPEN_FILES
from common.npu.device import require_supported_torch
from common.npu.distributed import Ranks
from common.npu.output import release_output_folders
from common.npu.terminal import drop_if_broken, make_output_last

DEVICE_MEMORY_IS_FULL = "the memory of the device is full"
HOST_MEMORY_IS_FULL = "the memory of the host is full"
# What to do where it is not known which work has filled it.
REMEDIES = {
    DEVICE_MEMORY_IS_FULL: (
        "lower --batch_size (in evaluation --eval_batch_size), or take a device that nothing else "
        "uses"
    ),
    HOST_MEMORY_IS_FULL: ("lower --num_workers or --batch_size (in evaluation --eval_batch_size)"),
}
# What is behind some of the OSErrors.
MEANINGS = {
    errno.EMFILE: MORE_FILES,
    errno.ENFILE: MORE_FILES,
    errno.ENOSPC: "free space on that disk, or on the one that the output is redirected to",
    errno.ENOMEM: f"{HOST_MEMORY_IS_FULL}; {REMEDIES[HOST_MEMORY_IS_FULL]}",
    errno.EPIPE: "a process that reads this one's output has ended",
    errno.EIO: "a terminal was closed, or a disk or a network drive fails",
}


class ForeignError(NamedTuple):
    """An error that another library tells only in words, and what a user can do about it."""

    pattern: re.Pattern
    advice: str


# The only place that reads messages of other libraries: torch, torch_npu, gloo and HCCL raise plain
# RuntimeErrors where memory is full, a rank is gone or a loader worker was killed.
FULL_MEMORY = (
    (re.compile("DefaultCPUAllocator|Cannot allocate memory|bad_alloc"), HOST_MEMORY_IS_FULL),
    (
        re.compile("out of memory|STATUS_ALLOC_FAILED|Failed to allocate memory"),
        DEVICE_MEMORY_IS_FULL,
    ),
)
NO_KERNEL = re.compile("unable to find an engine to execute this computation")
FOREIGN_ERRORS = (
    ForeignError(
        re.compile(r"DataLoader worker \(pid"),
        "a loader worker has ended, often because memory or /dev/shm is full; lower --num_workers; "
        "a run goes on with --resume=auto",
    ),
    ForeignError(
        re.compile("Too many open files|received 0 items of ancdata"),
        f"too many open files; {MORE_FILES}",
    ),
)
LOST_RANK = ForeignError(
    re.compile("[Cc]onnection (closed|reset)|[Tt]imed? ?out|Hccl"),
    "another rank has ended or does not answer, see its own message; a run goes on with "
    "--resume=auto",
)
LONGEST_REASON = 200  # characters of another library's message


def run(main: Callable[[], int | None]) -> None:
    """Call an entry script's `main` and exit with its status, or with 1 after a line on stderr.

    Mistakes of ours keep their traceback.
    """
    make_output_last()
    allow_open_files()
    is_user_error = False
    try:
        require_supported_torch()
        status = main()
        _leave_process_group()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        explained = as_user_error(error)
        if explained is None:
            raise
        status = f"{_error_label()}: {one_line(explained)}"
        is_user_error = isinstance(error, UserError)
        del explained  # its traceback would keep the process group
    finally:
        drop_if_broken(sys.stdout)
        _kill_workers()
        release_output_folders()
    # Else gloo's threads abort one process in four that ends right after a collective. Of an
    # accelerator's group this could wait for ever: another rank may not do what is in flight.
    if is_user_error and dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        _leave_process_group()
    sys.exit(status)


def as_user_error(error: Exception) -> UserError | None:
    """Return an error as one that a user can put right, None for a mistake of ours.

    Of the machine's errors that is a full memory, disk or table of files, a lost rank, and a loader
    worker that was killed or whose batch did not arrive.
    """
    if isinstance(error, UserError):
        return error
    message = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(_reason(error))
    full = full_memory(error)
    if full is not None:
        return full.as_user_error(REMEDIES[full.problem])
    if isinstance(error, EOFError):
        # A tensor of a worker could not be received.
        return UserError(
            "a loader worker has closed its connection, often because too many files are open; "
            f"{MORE_FILES}; a run goes on with --resume=auto"
        )
    if not isinstance(error, OSError | RuntimeError):
        return None
    candidates = list(FOREIGN_ERRORS)
    if dist.is_initialized():
        candidates.append(LOST_RANK)
    for pattern, advice in candidates:
        for line in message.splitlines():
            if pattern.search(line):
                return UserError(_with_reason(advice, line))
    if isinstance(error, OSError):  # such as one that a loader worker has met
        return UserError(_last_line(message))
    return None


class FullMemory(NamedTuple):
    """The memory of the device or of the host was full."""

    problem: str  # DEVICE_MEMORY_IS_FULL or HOST_MEMORY_IS_FULL
    line: str  # of the message of torch or another library, which may say how much it wanted

    def as_user_error(self, remedy: str, details: str = "") -> UserError:
        """Return the error with a remedy; `details` follow what was full."""
        return UserError(self.problem + details, _with_reason(remedy, self.line))


def full_memory(error: Exception) -> FullMemory | None:
    """Return which memory was full where that is what an error says, else None."""
    message = str(error)
    if isinstance(error, MemoryError):
        return FullMemory(HOST_MEMORY_IS_FULL, _last_line(message))
    if isinstance(error, torch.OutOfMemoryError):
        return FullMemory(DEVICE_MEMORY_IS_FULL, message.partition("\n")[0])
    if not isinstance(error, OSError | RuntimeError):
        return None
    for pattern, problem in FULL_MEMORY:
        for line in message.splitlines():
            if pattern.search(line):
                return FullMemory(problem, line)
    return None


def found_no_kernel(error: Exception) -> bool:
    """Return whether cuDNN has found no kernel for a convolution.

    Where one has been found for a smaller batch, the kernels lack memory: torch passes over those
    whose workspace does not fit, and says only this at the end.
    """
    return isinstance(error, RuntimeError) and NO_KERNEL.search(str(error)) is not None


def allow_open_files() -> None:
    """Raise this process's limit of open files, up to the hard one: each tensor in flight is one.

    The hard limit may be a thousand million, which programs that close all numbers would go
    through: so many are not asked for.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _reason(error: OSError) -> str:
    details = [error.strerror]
    if error.filename:
        details.append(str(error.filename))
    if error.errno in MEANINGS:
        details.append(MEANINGS[error.errno])
    return ": ".join(details)


def _with_reason(advice: str, line: str) -> str:
    """Add a line of another library's message."""
    if not line:
        return advice
    return f"{advice} ({shorten(line, LONGEST_REASON, placeholder=' ...')})"


def _last_line(message: str) -> str:
    lines = message.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _error_label() -> str:
    rank = os.environ.get("RANK")
    return "error" if rank is None else f"error (rank {rank})"


def _leave_process_group() -> None:
    if dist.is_initialized():
        gc.collect()  # nothing may keep the group: its threads would outlive it
        dist.destroy_process_group()


def _kill_workers() -> None:
    """Kill loader workers that an error left behind, which outlive a SIGTERM."""
    leave_dead_workers_to_the_loader()
    for worker in multiprocessing.active_children():
        worker.kill()


def leave_dead_workers_to_the_loader() -> None:
    """Let the loader itself raise the error about a worker that was killed, at its next batch.

    torch's handler of SIGCHLD raises it wherever the program happens to be: in the middle of a step
    or of saving.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def stop_signals() -> list[int]:
    """Return the signals that ask a program to stop.

    The loss of the terminal is one unless the program was started to outlive it (`nohup`).
    """
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


class StopRequest:
    """A signal asks all ranks to stop at the same step; a Ctrl-C after that does not wait.

    `status` is the exit status of a process ended by the signal, 143 for SIGTERM.
    """

    def __init__(self) -> None:
        self.requested = False
        self.status = 128 + signal.SIGTERM
        for number in stop_signals():
            signal.signal(number, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        self.status = 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, ranks: Ranks, also: bool = False) -> bool:
        """Return, on all ranks, whether one of them was asked to stop or has a reason (`also`)."""
        return ranks.any(self.requested or also)
