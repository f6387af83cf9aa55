"""The interpreter that quickstart.sh and run_tests.sh take, where they need not make one."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "common/npu/venv.sh"


@pytest.fixture
def repository(tmp_path):
    """A folder with the script where the repository has it, and no .venv."""
    script = tmp_path / "common/npu/venv.sh"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text())
    return tmp_path


def find_python(repository, on_npu_host, python=""):
    """Return the process that has sourced the script, which prints PYTHON at its end."""
    script = f"""
        set -eu
        source {repository}/common/npu/venv.sh
        _has_npu() {{ {"true" if on_npu_host else "false"}; }}
        find_python requirements.txt
        echo "$PYTHON"
    """
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)


def test_on_an_ascend_host_nothing_is_fetched(repository):
    done = find_python(repository, on_npu_host=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: this host has an Ascend NPU, and ")
    assert "five commands in README.md" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (repository / ".venv").exists()


def test_on_an_ascend_host_an_environment_with_torch_npu_is_taken(repository):
    (repository / ".venv/lib/python3.11/site-packages/torch_npu").mkdir(parents=True)
    done = find_python(repository, on_npu_host=True)
    assert done.stdout == f"{repository}/.venv/bin/python\n"


@pytest.mark.parametrize("on_npu_host", [True, False])
def test_the_users_interpreter_is_taken_as_it_is(repository, on_npu_host):
    assert find_python(repository, on_npu_host, python="bash").stdout == "bash\n"
    done = find_python(repository, on_npu_host, python="/nowhere/python3")
    assert (
        done.stderr
        == "error: PYTHON=/nowhere/python3 does not exist; unset PYTHON, and a .venv is made\n"
    )
