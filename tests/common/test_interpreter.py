"""A program under an interpreter that cannot run it."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.npu import interpreter

ROOT = Path(__file__).parents[2]
MODELS = ("ssd_mmdet", "ssd_resnet34", "m2det", "fcos")
ENTRY_SCRIPTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in ("common", *MODELS)))
    for path in ROOT.glob(pattern)
    if "entry.run(main)" in path.read_text()
)


def test_the_entry_scripts_are_found():
    names = {str(path) for path in ENTRY_SCRIPTS}
    for model in MODELS:
        assert {f"{model}/{name}.py" for name in ("train", "evaluate", "demo")} <= names
    assert {"selfcheck.py", "fcos/pthtar2onx.py", "fcos/weights.py"} <= names
    assert {"ssd_resnet34/tfrecord/launch.py", "common/npu/launch.py"} <= names


@pytest.mark.parametrize("script", ENTRY_SCRIPTS, ids=str)
def test_a_program_without_packages_says_so_in_one_line(script):
    program = [script]
    if "sys.path.insert" not in (ROOT / script).read_text():
        program = ["-m", ".".join(script.with_suffix("").parts)]
    # -S: without the folder of installed packages.
    command = [sys.executable, "-S", *program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {sys.executable} has no torch, numpy, ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script", [*ENTRY_SCRIPTS, "common/__init__.py", "common/npu/__init__.py"], ids=str
)
def test_an_old_python_understands_what_it_reads_before_its_line(script):
    ast.parse((ROOT / script).read_text(), feature_version=(3, 7))


def test_this_interpreter_has_what_is_needed():
    assert interpreter.find_fault() == ""


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(interpreter, "OLDEST_PYTHON", (99, 1))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    expected = f"is Python {version}, and the programs need 99.1 or newer"
    assert interpreter.find_fault() == expected


def test_the_remedy_is_the_interpreter_that_has_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert interpreter.find_remedy(tmp_path) == (
        "install the packages that the model's requirements.txt lists"
    )
    (tmp_path / "requirements.txt").touch()
    installed = f"install the packages with `{sys.executable} -m pip install -r requirements.txt`"
    assert interpreter.find_remedy(tmp_path).startswith(installed)
    (tmp_path / ".venv/lib/python3.12/site-packages/torch").mkdir(parents=True)
    assert interpreter.find_remedy(tmp_path) == "use .venv/bin/python"
    # Of no use where it is that interpreter that lacks another package.
    monkeypatch.setattr(sys, "executable", str(python))
    assert interpreter.find_remedy(tmp_path).startswith("install the packages with")


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ZeroDivisionError"])
def test_ctrl_c_during_the_imports_of_a_rank_shows_no_traceback(error):
    done = subprocess.run(
        [sys.executable, "-c", f"import common.npu.interpreter; raise {error}"],
        cwd=ROOT,
        env={**os.environ, "LOCAL_RANK": "1"},
        capture_output=True,
        text=True,
    )
    if error == "KeyboardInterrupt":
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    else:
        assert done.returncode == 1
        assert "Traceback" in done.stderr
