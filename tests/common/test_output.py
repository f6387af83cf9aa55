import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.npu import output

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_folder_in_use_is_refused(tmp_path, resumed):
    """A lock of another process; the children of that process do not hold it any longer."""
    code = (
        "import os, sys, time; from pathlib import Path; from common.npu import output\n"
        "output.claim_output_folder(Path(sys.argv[1]), True)\n"
        "child = os.fork()\n"
        "print(child, flush=True) if child else os.close(1)\n"
        "time.sleep(60)"
    )
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "log").write_text("at work")
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as other:
        child = int(other.stdout.readline())
        try:
            with pytest.raises(UserError, match=r"output: a running process uses it; name another"):
                output.claim_output_folder(folder, resumed)
            assert (folder / "log").read_text() == "at work"
            other.kill()
            other.wait()
            output.claim_output_folder(folder, resumed)
            assert (folder / "log").exists() == resumed
        finally:
            other.kill()
            os.kill(child, 9)


def test_a_former_run_is_renamed_and_never_deletes(tmp_path):
    folder = tmp_path / "output"
    assert output.claim_output_folder(folder, False) == []
    assert output.claim_output_folder(folder, False) == []
    for text in ("first", "second", "third"):
        (folder / "log").write_text(text)
        (line,) = output.claim_output_folder(folder, False)
        assert str(folder) in line
        assert [path.name for path in folder.iterdir()] == [output.LOCK_FILE]
        assert Path(line.split()[-1], "log").read_text() == text
    kept = sorted(path for path in tmp_path.iterdir() if path != folder)
    assert {path.joinpath("log").read_text() for path in kept} == {"first", "second", "third"}
    (folder / "log").write_text("fourth")
    os.utime(folder, (1.7e9, 1.7e9))
    (line,) = output.claim_output_folder(folder, False)
    clash = Path(line.split()[-1])
    assert clash.name.startswith("output_20231114_") or clash.name.startswith("output_20231115_")
    (folder / "log").write_text("fifth")
    os.utime(folder, (1.7e9, 1.7e9))
    with pytest.raises(UserError, match=r"--output_dir .* cannot be made: .*not empty"):
        output.claim_output_folder(folder, False)
    assert (folder / "log").read_text() == "fifth"
    assert (clash / "log").read_text() == "fourth"
