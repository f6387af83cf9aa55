"""What every entry script does around its work: errors in one line, a stop at the next step."""

import gc
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

from common.errors import UserError, one_line
from common.npu.distributed import Ranks
from common.npu.output import release_output_folders

# The only place that reads messages of other libraries: torch, gloo and HCCL raise plain
# RuntimeErrors and tell only in words that a rank is gone or that a loader worker was killed.
LOST_RANK = re.compile("[Cc]onnection (closed|reset)|[Tt]imed? ?out|Hccl")
KILLED_WORKER = re.compile("DataLoader worker")


def run(main: Callable[[], int | None]) -> None:
    """Call an entry script's `main` and exit with its status, or with 1 after a line on stderr.

    Mistakes of ours keep their traceback.
    """
    try:
        status = main()
        _leave_process_group()
    except UserError as error:
        status = f"{_error_label()}: {one_line(error)}"
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except OSError as error:  # such as a full or read-only disk
        status = f"{_error_label()}: {_reason(error)}"
    except RuntimeError as error:
        advice = _advice(error)
        if advice is None:
            raise
        reason = str(error).strip().splitlines()[0]
        status = f"{_error_label()}: {advice}; go on with --resume=auto ({reason})"
    finally:
        _kill_workers()
        release_output_folders()
    sys.exit(status)


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{reason}: {error.filename}" if error.filename else reason


def _error_label() -> str:
    rank = os.environ.get("RANK")
    return "error" if rank is None else f"error (rank {rank})"


def _advice(error: RuntimeError) -> str | None:
    """Return what a user can do about an error of another library, None for a mistake of ours."""
    message = str(error)
    if KILLED_WORKER.search(message):
        return "often because memory or /dev/shm is full; lower --num_workers"
    if dist.is_initialized() and LOST_RANK.search(message):
        return "another rank has ended or does not answer, see its own message"
    return None


def _leave_process_group() -> None:
    if dist.is_initialized():
        gc.collect()  # nothing may keep the group: its threads would outlive it
        dist.destroy_process_group()


def _kill_workers() -> None:
    """Kill loader workers that an error left behind, which outlive a SIGTERM."""
    # torch's handler would raise a RuntimeError for the workers killed here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


class StopRequest:
    """SIGTERM and Ctrl-C ask all ranks to stop at the same step; a second Ctrl-C does not wait.

    `status` is the exit status of a process ended by the signal, 143 for SIGTERM.
    """

    def __init__(self) -> None:
        self.requested = False
        self.status = 128 + signal.SIGTERM
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        self.status = 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, ranks: Ranks, also: bool = False) -> bool:
        """Return, on all ranks, whether one of them was asked to stop or has a reason (`also`)."""
        return ranks.any(self.requested or also)
