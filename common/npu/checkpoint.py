"""Checkpoint files: written whole or not at all, checked before use, never executed."""

import io
import os
import pickle
import stat
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from common.errors import UserError
from common.files import write_atomically
from common.npu.file_kinds import is_safetensors, require_checkpoint
from common.npu.foreign import Placeholder, is_numpy, placeholder_classes
from common.npu.identify import require_model
from common.npu.weights import WRAPPERS, recipe_entry, tensors_of

DIRECTORY = 0x10  # in the external attributes of a zip archive's entry
BEST = "best.pt"  # of a run, by its AP
EVALUATED = "evaluated.pt"  # the state that an evaluation in the background is of
PREFIX = "iter_"  # of a checkpoint's file name, before the number of steps
# What the state of a run is made of, see `RunState`.
ENTRIES_OF_A_RUN = {
    "model": Mapping,
    "buffers": list,
    "windows": list,
    "optimizer": Mapping,
    "scaler": Mapping,
    "iteration": int,
    "best": int | float,
    "classes": list | tuple,
    "category_ids": list | tuple,
    "run": Mapping,
}
SUPERSEDED = ".superseded"  # end of the name of a checkpoint that a resumed run left behind


def save(path: Path, state: dict) -> None:
    """Write `state`, with its tensors moved to the CPU so that any host can read them.

    At every moment `path` is the old file or the new one.
    """
    buffer = io.BytesIO()
    torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, state), buffer)
    write_atomically(path, buffer.getbuffer())


def keep_evaluated(folder: Path, is_best: bool) -> None:
    """Make the state of an evaluation, if one was saved, that of `best.pt`, or delete it."""
    evaluated = folder / EVALUATED
    if is_best and evaluated.exists():
        evaluated.replace(folder / BEST)
    evaluated.unlink(missing_ok=True)


def load(path: str | Path) -> dict:
    """Read a checkpoint, ours or a published one, to the CPU, and add its "path".

    It is read with `weights_only=True`. What foreign classes left in the metadata of other projects
    becomes a Placeholder. A file of the format safetensors is read where the package is there.
    Raise UserError, naming the file, where it is missing, damaged or no checkpoint.
    """
    _require_file(path)
    try:
        if is_safetensors(path):
            return {**_load_safetensors(path), "path": str(path)}
        require_checkpoint(path)
        _check_archive(path)
        state = _load_tensors(path)
    except UserError:
        raise
    except pickle.UnpicklingError:
        reason = "holds more than tensors and plain values, or is damaged; save its state dict"
        raise UserError(f"checkpoint {path} {reason}") from None
    except Exception as error:  # there is no end to what damage can lead to
        reason = f"is cut short or damaged ({error!r:.120}); use another copy"
        raise UserError(f"checkpoint {path} {reason}") from None
    if not isinstance(state, dict):
        raise UserError(
            f"checkpoint {path} holds a {type(state).__name__}, not a dictionary; give a "
            "checkpoint of train.py or a state dict"
        )
    _require_tensors(path, state)
    return {**state, "path": str(path)}


def _require_file(path: str | Path) -> None:
    """Raise UserError where a path does not lead to a file that can be read."""
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            with open(path, "rb"):
                return
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; check the path") from None
    except PermissionError:
        raise UserError(f"checkpoint {path} may not be read", "change its permissions") from None
    except OSError as error:  # a name that is too long, a link to itself, a file as a folder
        problem = f"checkpoint {path} cannot be opened ({error.strerror})"
        raise UserError(problem, "check the path") from None
    raise UserError(f"checkpoint {path} is a folder", "give the file in it")


def _require_tensors(path: str | Path, state: dict) -> None:
    """Raise UserError where something else lies under a name that weights have, and no tensor."""
    if tensors_of({**state, "path": str(path)}):
        return
    for name in WRAPPERS:
        value = state.get(name)
        if isinstance(value, Placeholder):
            raise UserError(
                f"checkpoint {path} has no tensors: {name} is a pickled {type(value).__name__}",
                "save its state dict instead, in the program that wrote it",
            )
        if isinstance(value, dict) and any(is_numpy(entry) for entry in value.values()):
            raise UserError(
                f"checkpoint {path} has no tensors: {name} holds NumPy arrays",
                "make tensors of them with torch.from_numpy",
            )


def _load_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(
            f"checkpoint {path} is of the format safetensors, whose package is not installed",
            "pip install safetensors",
        ) from None
    return load_file(path)


def _check_archive(path: str | Path) -> None:
    """Raise BadZipFile where a checkpoint's bytes are not those that were written.

    An entry that is marked as a directory would be read as uninitialised memory.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        directories = [entry for entry in archive.infolist() if entry.external_attr & DIRECTORY]
        if directories or archive.testzip() is not None:  # testzip compares every byte's CRC
            raise zipfile.BadZipFile("its bytes are not those that were written")


def _load_tensors(path: str | Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        with torch.serialization.safe_globals(placeholder_classes(path)):
            return torch.load(path, map_location="cpu", weights_only=True)


def checkpoints_newest_first(folder: Path, last_step: int = sys.maxsize) -> list[Path]:
    """Return the checkpoints `iter_<n>.pt` of a folder up to `last_step`, most steps first."""
    numbered = []
    for path in folder.glob(f"{PREFIX}*.pt"):
        steps = path.stem.removeprefix(PREFIX)
        if steps.isdecimal() and int(steps) <= last_step:
            numbered.append((int(steps), path))
    return [path for _, path in sorted(numbered, reverse=True)]


def written_since(started: float, folder: Path) -> bool:
    """Return whether a folder has an `iter_<n>.pt` written after `started`, in epoch seconds."""
    return any(path.stat().st_mtime >= started for path in checkpoints_newest_first(folder))


def load_newest(folder: Path, warn: Callable[[str], None] | None = None) -> dict | None:
    """Load the newest whole checkpoint of a folder; `warn` of each that is skipped.

    Where there is no other, that is `best.pt`. The warnings are printed to stderr by default.
    """
    candidates = checkpoints_newest_first(folder)
    best = folder / BEST
    if best.is_file():
        candidates.append(best)
    for path in candidates:
        try:
            return load(path)
        except UserError as error:
            message = f"skipping {error}"
            if warn is None:
                print(message, file=sys.stderr)
            else:
                warn(message)
    return None


def load_best(folder: Path) -> dict | None:
    """Load `best.pt` of a folder, else its newest whole checkpoint."""
    best = folder / BEST
    if best.is_file():
        try:
            return load(best)
        except UserError as error:
            print(f"skipping {error}", file=sys.stderr)
    return load_newest(folder)


def load_resume_state(
    resume: str,
    folder: Path,
    model: str,
    weights_flag: str = "--checkpoint_path",
    warn: Callable[[str], None] | None = None,
) -> dict | None:
    """Load the state that `--resume none|auto|FILE` names; None for a fresh start.

    Raise UserError where it is of another model than `model`, or not a whole state of a run; its
    weights can then be given by `weights_flag`. `warn` as in `load_newest`.
    """
    if resume == "none":
        return None
    if resume == "auto":
        state = load_newest(folder, warn)
    else:
        state = load(resume)
    if state is None:
        return None
    path = state["path"]
    require_model(state, tensors_of(state), model, path)
    unusable = []
    if not recipe_entry(state):
        unusable.append("recipe")
    for name, kind in ENTRIES_OF_A_RUN.items():
        if not isinstance(state.get(name), kind):
            unusable.append(name)
    if unusable:
        reason = "holds weights only"
        if isinstance(state.get("run"), Mapping):
            reason = f"not a whole state of a run (nothing usable as {', '.join(unusable)})"
        raise UserError(f"--resume {path}: {reason}", f"use {weights_flag} {path}")
    return state


def load_state_up_to(
    last_step: int,
    resume: str,
    folder: Path,
    model: str,
    weights_flag: str = "--checkpoint_path",
    warn: Callable[[str], None] = print,
) -> dict | None:
    """Load the newest whole state of a run with at most `last_step` steps, None without one.

    It is looked for among the checkpoints of the folder, then in the file of `--resume`, from which
    the run may have gone on. `warn` of each that cannot be used. Raise UserError as
    `load_resume_state` does for the file of `--resume`.
    """
    candidates = checkpoints_newest_first(folder, last_step)
    best = folder / BEST
    if best.is_file():
        candidates.append(best)
    for path in candidates:
        try:
            state = load_resume_state(str(path), folder, model, weights_flag)
        except UserError as error:
            warn(f"skipping {error}")
            continue
        if state["iteration"] <= last_step:
            return state
    if resume in ("none", "auto"):
        return None
    state = load_resume_state(resume, folder, model, weights_flag)
    return state if state["iteration"] <= last_step else None


def set_aside_later(folder: Path, last_step: int) -> list[Path]:
    """Rename the checkpoints after `last_step`, from which a resumed run goes on; return them.

    They are damaged or belong to another course: `--resume=auto` must not take them any more.
    """
    kept = checkpoints_newest_first(folder, last_step)
    later = [path for path in checkpoints_newest_first(folder) if path not in kept]
    for path in later:
        path.rename(path.with_name(path.name + SUPERSEDED))
    return later


def delete_old(folder: Path, last_step: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `last_step`, and unfinished files."""
    superseded = checkpoints_newest_first(folder, last_step)[max(1, keep) :]
    unfinished = list(folder.glob("*.pt.*.tmp"))
    for path in superseded + unfinished:
        path.unlink(missing_ok=True)
