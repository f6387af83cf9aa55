"""Output for a person whose terminal or reader is gone, or has not all characters."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.npu.terminal import LastingOutput

ROOT = Path(__file__).parents[2]


def stream_to(descriptor):
    raw = LastingOutput(descriptor, "w")
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=True)


def test_a_pipe_that_nobody_reads_takes_every_line():
    reader, writer = os.pipe()
    with stream_to(writer) as stream:
        print("read", file=stream)
        assert os.read(reader, 100) == b"read\n"
        os.close(reader)
        for _ in range(3):
            print("lost", file=stream)
        assert os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev


def test_a_terminal_that_is_closed_takes_every_line():
    master, slave = os.openpty()
    with stream_to(slave) as stream:
        print("read", file=stream)
        assert os.read(master, 100) == b"read\r\n"
        os.close(master)
        for _ in range(3):
            print("lost", file=stream)


def test_a_full_disk_is_an_error():
    stream = stream_to(os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError, match="No space left"):
        print("figures", file=stream)
    with pytest.raises(OSError, match="No space left"):
        stream.close()


def test_a_program_behind_head_ends_well_and_escapes_what_the_terminal_lacks(tmp_path):
    code = f"""
import sys
from pathlib import Path
from tqdm import tqdm
from common.fps.runlog import RunLog
from common.npu import entry
from common.npu.distributed import Ranks

def main():
    with RunLog(Ranks()) as log:
        log.open(Path({str(tmp_path)!r}), 0)
        print("\\u732b", flush=True)
        sys.stdin.read()  # until the reader has ended
        for number in tqdm(range(100), disable=False):
            log.info(f"line {{number}}")
    return 130

entry.run(main)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as program:
        assert program.stdout.readline() == b"\\u732b\n"
        program.stdout.close()
        program.stdin.close()
        assert program.wait(60) == 130
    assert (tmp_path / "train_0.log").read_text().count("INFO - line ") == 100
