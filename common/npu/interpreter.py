"""Stop a program in one line where its interpreter is too old or lacks a package.

Every entry script imports this module before all others of its own. It needs the standard library
only, and no syntax newer than Python 3.6, so that it can say what is wrong.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 10)
# What is imported at the start of every program; what only some need is asked for there.
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "PIL": "pillow",
    "simplejpeg": "simplejpeg",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
}


def require_packages() -> None:
    """Exit with status 1 and a line on stderr where this interpreter cannot run the programs."""
    fault = find_fault()
    if fault:
        sys.exit(f"error: {sys.executable} {fault}; {find_remedy(ROOT)}")


def find_fault() -> str:
    """Return what is wrong with this interpreter, as the end of a sentence; empty: nothing."""
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(str(number) for number in sys.version_info[:2])
        oldest = ".".join(str(number) for number in OLDEST_PYTHON)
        return f"is Python {version}, and the programs need {oldest} or newer"
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        return f"has no {', '.join(missing)}"
    return ""


def find_remedy(root: Path) -> str:
    """Return how to get an interpreter that can run the programs, for the repository at `root`."""
    interpreter = root / ".venv" / "bin" / "python"
    has_torch = any(root.glob(".venv/lib/python*/site-packages/torch"))
    if has_torch and interpreter.exists() and not is_running(interpreter):
        return f"use {os.path.relpath(interpreter)}"
    requirements = root / "requirements.txt"
    if not requirements.exists():  # a model folder that was copied elsewhere
        return "install the packages that the model's requirements.txt lists"
    quickstart = os.path.relpath(root / "quickstart.sh")
    return (
        f"install the packages with `{sys.executable} -m pip install -r "
        f"{os.path.relpath(requirements)}`, or let `bash {quickstart}` make .venv with them"
    )


def is_running(interpreter: Path) -> bool:
    """Return whether this process is that interpreter of a virtual environment."""
    return os.path.abspath(sys.executable) == os.path.abspath(str(interpreter))


def hide_interrupt(kind, error, traceback) -> None:
    """Print an exception that nothing has caught, but for Ctrl-C; a `sys.excepthook`."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


# Of the processes that torchrun starts each would print a traceback where Ctrl-C comes while the
# packages are imported.
if "LOCAL_RANK" in os.environ:
    sys.excepthook = hide_interrupt
require_packages()
