"""What every entry script does around its work: errors in one line, a stop at the next step."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable

from common.npu.distributed import Ranks, shutdown
from common.npu.errors import UserError, one_line


def run(main: Callable[[], int | None]) -> None:
    """Run an entry script's `main` and exit: 0, its own status, or 1 after a UserError's line."""
    try:
        status = main()
    except UserError as error:
        rank = os.environ.get("RANK")
        if rank not in (None, "0"):
            # Where all ranks meet the same error rank 0's line is enough: meanwhile the launcher
            # ends the others.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        # Loader workers that an error left behind sit out a SIGTERM, multiprocessing's too.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    shutdown()
    sys.exit(status or 0)


class StopRequest:
    """SIGTERM and Ctrl-C ask all ranks to stop at the same step; a second Ctrl-C kills."""

    def __init__(self) -> None:
        self._signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self._signal is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._signal = number

    def agreed(self, ranks: Ranks, also: bool = False) -> bool:
        """Whether any rank was asked to stop, or brings its own reason; the same on all ranks."""
        return ranks.any(also or self._signal is not None)

    @property
    def status(self) -> int:
        """Exit status of a process ended by the signal, 143 for SIGTERM."""
        return 128 + (self._signal or signal.SIGTERM)
