"""A call in a process of its own, of code that needs no device, while the caller goes on.

The process is this module (`python3 -m common.npu.background`). It joins no other ranks, gets no
signal of the terminal, and ends when the process that started it has ended.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common  # noqa: F401 before torch
from common.errors import UserError, one_line
from common.npu.entry import as_user_error
from common.npu.loading import CORES_AT_START

MODULE = "common.npu.background"
ROOT = Path(__file__).resolve().parents[2]
SECONDS_BETWEEN_LOOKS = 0.5  # at whether the parent is there


class Outcome(NamedTuple):
    """What has become of a call."""

    value: object
    lines: list[str]  # that were logged
    error: str | None  # the message of what a user can put right


class BackgroundCall:
    """A call in a process of its own.

    `function` and what it takes must be importable and picklable; it also takes `log`, a function
    for lines of text.
    """

    def __init__(self, name: str, function: Callable, *arguments: object):
        self._name = name
        # Files, because a pipe would make the caller wait until the process has started.
        self._outcome = tempfile.TemporaryFile()  # noqa: SIM115 `outcome` closes it
        with tempfile.TemporaryFile() as request:
            pickle.dump((CORES_AT_START, function, arguments), request)
            request.seek(0)
            descriptor = self._outcome.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(descriptor), str(os.getpid())],
                stdin=request,
                pass_fds=[descriptor],
                env={**os.environ, "PYTHONPATH": _python_path()},
                start_new_session=True,
            )

    def finished(self) -> bool:
        """Return whether `outcome` would not wait."""
        return self._process.poll() is not None

    def outcome(self) -> Outcome:
        """Wait for the call and return what has become of it.

        Raise UserError for the error of a call, and for a process that ended without an outcome.
        """
        status = self._process.wait()
        self._outcome.seek(0)
        content = self._outcome.read()
        self._outcome.close()
        if status != 0 or not content:
            ending = f"status {status}"
            if status < 0:
                ending = f"signal {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                ending += ", often because memory is full"
            raise UserError(
                f"{self._name}: its process ended with {ending}",
                "a run goes on with --resume=auto, without --background_metrics if need be",
            )
        outcome = Outcome(*pickle.loads(content))
        if outcome.error is not None:
            raise UserError(f"{self._name}: {outcome.error}")
        return outcome


def _python_path() -> str:
    paths = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return os.pathsep.join(paths)


def main(outcome_descriptor: int, parent: int) -> None:
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    # They may reach every process of a job: the run waits for the metrics before it saves and ends.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cores, function, arguments = pickle.load(sys.stdin.buffer)
    # Those of the thread that started this process may be one, see `overlap`.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    value = None
    lines: list[str] = []
    message = None
    try:
        value = function(*arguments, log=lines.append)
    except Exception as error:
        explained = as_user_error(error)
        if explained is None:
            raise
        message = one_line(explained)
    with open(outcome_descriptor, "wb") as file:
        pickle.dump((value, lines, message), file)


def end_with(parent: int) -> None:
    """End this process when its parent has ended, however it did."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
