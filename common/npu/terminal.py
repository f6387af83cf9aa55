"""Output for a person, which is never vital: the log file has every line of a run already."""

import errno
import io
import os
import sys

# The reader of a pipe has ended, the terminal was closed.
READER_IS_GONE = (errno.EPIPE, errno.EIO)


class LastingOutput(io.FileIO):
    """A file descriptor whose reader may go away: what is written after that goes nowhere."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in READER_IS_GONE:
                raise
        drop(self)
        return super().write(content)


def drop(stream: io.IOBase) -> None:
    """Let go nowhere what a stream still holds and all that follows."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def drop_if_broken(stream: io.IOBase) -> None:
    """Drop a stream that cannot be written, which the end of the process would complain about."""
    try:
        stream.flush()
    except OSError:
        drop(stream)


def make_output_last() -> None:
    """Let this process outlive its terminal and the program behind its pipe.

    Characters that the terminal does not have are escaped. A stream that was closed before the
    program began goes nowhere. Streams that a caller has put in the place of the process's own are
    left alone.
    """
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(sys.stderr)


def _nowhere() -> io.TextIOWrapper:
    return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    output = LastingOutput(stream.fileno(), "w", closefd=False)
    if not stream.write_through:  # that is: unless PYTHONUNBUFFERED is set
        output = io.BufferedWriter(output)
    return io.TextIOWrapper(
        output,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
