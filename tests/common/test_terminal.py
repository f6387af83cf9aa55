"""Output for a person whose terminal or reader is gone, or has not all characters."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.fps.runlog import RunLog
from common.npu.distributed import Ranks
from common.npu.terminal import LastingOutput, drop_if_broken

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
    with stream_to(os.open("/dev/full", os.O_WRONLY)) as stream:
        with pytest.raises(OSError, match="No space left"):
            print("figures", file=stream)
        drop_if_broken(stream)  # else it cannot be closed
        print("more", file=stream)


@pytest.mark.parametrize("figures", ["AP 0.5", "AP 0.5\\n" * 9999])
def test_figures_that_reach_no_disk_are_one_line_and_status_1(figures):
    code = f"from common.npu import entry; entry.run(lambda: print('{figures}'))"
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == (
        "error: No space left on device: free space on that disk, or on the one that the output is "
        "redirected to\n"
    )


def test_a_run_does_not_need_the_disk_behind_its_redirected_output(tmp_path, monkeypatch):
    with stream_to(os.open("/dev/full", os.O_WRONLY)) as stream, RunLog(Ranks()) as log:
        monkeypatch.setattr(sys, "stdout", stream)
        log.open(tmp_path, 0)
        for _ in range(3):
            log.info("a line")
        stream.flush()  # as the start of a loader worker does
        monkeypatch.undo()
    assert (tmp_path / "train_0.log").read_text().count("a line") == 3


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
        print("\\u732b")
        sys.stdin.read()  # until the reader has ended
        for number in tqdm(range(100), disable=False):
            log.info(f"line {{number}}")
    return 130

entry.run(main)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as program:
        assert program.stdout.readline() == b"\\u732b\n"
        program.stdout.close()
        program.stdin.close()
        assert program.wait(60) == 130
    assert (tmp_path / "train_0.log").read_text().count("INFO - line ") == 100
