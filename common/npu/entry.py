"""What every entry script does around its work: errors in one line, a stop at the next step."""

import gc
import multiprocessing
import os
import re
import signal
import sys

import torch.distributed as dist

from common.errors import UserError, one_line
from common.npu.distributed import Ranks

# What gloo and HCCL say of a rank that is gone or does not come.
LOST = re.compile("[Cc]onnection (closed|reset)|[Tt]imed? ?out|Hccl")


def run(main) -> None:
    """Call an entry script's `main` and exit: with its status, or 1 after a UserError's line."""
    name = f"error (rank {os.environ['RANK']})" if "RANK" in os.environ else "error"
    try:
        status = main()
        if dist.is_initialized():
            gc.collect()  # nothing may keep the group: its threads would outlive it
            dist.destroy_process_group()
    except UserError as error:
        status = f"{name}: {one_line(error)}"
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except OSError as error:  # such as a full or read-only disk
        status = f"{name}: {error.strerror or error}: {error.filename or 'see --output_dir'}"
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            hint = "often for want of memory or /dev/shm; lower --num_workers"
        elif dist.is_initialized() and LOST.search(str(error)):
            hint = "another rank has ended or does not answer, see its own message"
        else:
            raise
        reason = str(error).strip().splitlines()[0]
        status = f"{name}: {hint}; go on with --resume=auto ({reason})"
    finally:
        # Loader workers that an error left behind sit out a SIGTERM, multiprocessing's too.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    sys.exit(status)


class StopRequest:
    """SIGTERM and Ctrl-C ask all ranks to stop at the same step; a further Ctrl-C does not wait.

    status: the exit status of a process ended by the signal, 143 for SIGTERM.
    """

    def __init__(self) -> None:
        self.asked, self.status = False, 128 + signal.SIGTERM
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.asked, self.status = True, 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, ranks: Ranks, also: bool = False) -> bool:
        """Whether any rank was asked to stop, or brings its own reason; the same on all ranks."""
        return ranks.any(self.asked or also)
