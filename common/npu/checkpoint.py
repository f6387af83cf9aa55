"""Checkpoint files: written whole or not at all, checked before use, never executed."""

import contextlib
import os
import pickle
import re
import sys
import time
import zipfile
import zlib
from pathlib import Path

import torch

from common.npu.errors import UserError

# What zipfile raises for damage in its own structures.
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
_NAME = re.compile(r"iter_(\d+)\.pt$")


def save(path: Path, state: dict) -> None:
    """Write `state` so that `path` is at every moment the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # On a full disk torch's writer may hide the OSError behind one of its own.
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"checkpoint {path} cannot be written: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint of ours, or None: every byte is compared with its CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Marked a directory (0x10), an entry would be read as uninitialised memory.
            marked = (i.filename for i in archive.infolist() if i.external_attr & 0x10)
            bad = archive.testzip() or next(marked, None)
    except _UNREADABLE as error:
        return f"cut short or damaged ({error})"
    return None if bad is None else f"damaged ({bad} is not what was written)"


def load(path: str | Path) -> dict:
    """Read a checkpoint of ours or a published one to the CPU, with `weights_only=True`.

    Raises UserError naming the file when it is missing, damaged or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    if zipfile.is_zipfile(path) and (trouble := damage(path)):
        raise UserError(f"checkpoint {path} is {trouble}; use another copy")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {path} holds more than tensors and plain values, or is damaged; "
            "save its state dict alone"
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"checkpoint {path} is cut short or no checkpoint: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dictionary")
    return state


def path_of(folder: Path, iteration: int) -> Path:
    """The file of the state after `iteration` steps."""
    return folder / f"iter_{iteration}.pt"


def by_age(folder: Path) -> list[Path]:
    """The folder's checkpoints, newest (most steps) first."""
    found = [
        (int(m[1]), path) for path in folder.glob("iter_*.pt") if (m := _NAME.match(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if any, and a line for each that had to be skipped."""
    skipped = []
    for path in by_age(folder):
        try:
            load(path)
        except UserError as error:
            skipped.append(f"skipping {error}")
        else:
            return path, skipped
    return None, skipped


def to_resume(resume: str, folder: Path) -> dict | None:
    """The state that `--resume none|auto|FILE` names, with its "path"; None for a fresh start."""
    path = None if resume == "none" else resume
    if resume == "auto":
        path, skipped = newest(folder)
        for line in skipped:
            print(line, file=sys.stderr)
    if path is None:
        return None
    state = load(path)
    if "run" not in state:
        raise UserError(f"--resume {path}: holds weights only; use --checkpoint_path {path}")
    return {**state, "path": str(path)}


def tidy(folder: Path, iteration: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `iteration`, and what killed writers left.

    Later ones are of a former start and damaged, else it would have been resumed from them: they
    do not count, and this run will overwrite them.
    """
    own = [path for path in by_age(folder) if int(_NAME.match(path.name)[1]) <= iteration]
    for path in own[keep:]:
        path.unlink(missing_ok=True)
    for path in folder.glob("*.pt.*.tmp"):
        path.unlink(missing_ok=True)


def make_room(folder: Path) -> str | None:
    """Make an empty folder; one that a former run filled is renamed, and a line says so."""
    line = None
    try:
        if folder.is_dir() and any(folder.iterdir()):
            stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(folder.stat().st_mtime))
            aside, count = folder.with_name(f"{folder.name}_{stamp}"), 1
            while aside.exists():
                count += 1
                aside = folder.with_name(f"{folder.name}_{stamp}_{count}")
            folder.rename(aside)
            line = f"the former run in {folder} is now {aside}"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made: {error}") from None
    return line
