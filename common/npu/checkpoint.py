"""Checkpoint files: written whole or not at all, checked before use, never executed."""

import errno
import fcntl
import io
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from datetime import datetime
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from common.errors import UserError
from common.files import write_atomically

LOCK, LOCKS = ".lock", []  # a lock's file in its folder; those that this process holds


def save(path: Path, state: dict) -> None:
    """Write `state`, its tensors as those of a CPU: any host can read them.

    `path` is at every moment the old file or the new one.
    """
    buffer = io.BytesIO()
    torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, state), buffer)
    write_atomically(path, buffer.getbuffer())


class Placeholder:
    """Stands for an object of an unknown class, or where it has items a `plain` list or dict."""

    plain = None

    def __new__(cls, *args):
        return cls.plain() if cls.plain else super().__new__(cls)

    def __init__(self, *args):
        """Whatever the pickle gives."""

    __setstate__ = __init__

    def __setitem__(self, key, value):
        type(self).plain = OrderedDict

    def extend(self, items):
        type(self).plain = list

    append = extend


class _DryRun(pickle.Unpickler):
    """Unpickles without looking up a name: each becomes a Placeholder class in `found`."""

    def find_class(self, module: str, name: str) -> type:
        full = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        own = type(full[1], (Placeholder,), {"__module__": full[0]})
        return self.found.setdefault(full, own)

    def persistent_load(self, pid) -> None:
        """Tensors are left out."""


def _placeholders(path: str | Path) -> list[type]:
    """One for each name in a checkpoint's pickle. Where torch knows the name, it takes its own."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            pickles = [io.BytesIO(archive.read(name)) for name in names]
    else:  # of torch before 1.6: four pickles in a row, the last one is what was saved
        pickles = [io.BytesIO(Path(path).read_bytes())] * 4
    found = {}
    for file in pickles:
        run = _DryRun(file)
        run.found = found
        run.load()
    return [*found.values()]


def load(path: str | Path) -> dict:
    """Read a checkpoint, ours or published, to the CPU, with `weights_only=True`; add its "path".

    What foreign classes left in the metadata of other projects becomes a Placeholder. Raises
    UserError naming the file when it is missing, damaged or no checkpoint.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # Marked a directory (0x10), an entry would be read as uninitialised memory.
                bad = [entry for entry in archive.infolist() if entry.external_attr & 0x10]
                if bad or archive.testzip():  # every byte is compared with its CRC
                    raise zipfile.BadZipFile("its bytes are not those that were written")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            with torch.serialization.safe_globals(_placeholders(path)):
                state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict):
            return {**state, "path": str(path)}
        reason = f"holds a {type(state).__name__}, not a dictionary"
    except pickle.UnpicklingError:
        reason = "holds more than tensors and plain values, or is damaged; save its state dict"
    except Exception as error:  # what damage leads to has no limits
        reason = f"is missing, cut short or damaged ({error!r:.120}); use another copy"
    raise UserError(f"checkpoint {path} {reason}")


def by_age(folder: Path, last: int = sys.maxsize) -> list[Path]:
    """The checkpoints `iter_<n>.pt` of up to `last` steps, newest (most steps) first."""
    named = ((path.stem[5:], path) for path in folder.glob("iter_*.pt"))
    found = sorted(((int(steps), path) for steps, path in named if steps.isdecimal()), reverse=True)
    return [path for steps, path in found if steps <= last]


def newest(folder: Path) -> dict | None:
    """The newest whole checkpoint; a line tells each that had to be skipped."""
    for path in by_age(folder):
        try:
            return load(path)
        except UserError as error:
            print(f"skipping {error}", file=sys.stderr)
    return None


def to_resume(resume: str, folder: Path) -> dict | None:
    """The state that `--resume none|auto|FILE` names; None for a fresh start."""
    if resume == "none":
        return None
    state = newest(folder) if resume == "auto" else load(resume)
    if state and "run" not in state:
        raise UserError(f"--resume {resume}: holds weights only; use --checkpoint_path {resume}")
    return state


def tidy(folder: Path, last: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `last`, and what killed writers left.

    Later ones are of a former start and damaged, else it would have been resumed from them: they
    do not count, and this run will overwrite them.
    """
    for path in (*by_age(folder, last)[max(1, keep) :], *folder.glob("*.pt.*.tmp")):
        path.unlink(missing_ok=True)


def make_room(folder: Path, resumed: bool) -> str | None:
    """Take a folder for this process alone; unless `resumed`, one that a former run filled is
    renamed, and a line says so. Raises UserError where another process is at work in it."""
    aside = None
    try:
        if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()) and not resumed:
            stamp = datetime.fromtimestamp(folder.stat().st_mtime)
            _lock(folder)
            aside = folder.rename(f"{folder}_{stamp:%Y%m%d_%H%M%S_%f}")
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
    except BlockingIOError:
        raise UserError(f"--output_dir {folder}: a running process uses it; name another") from None
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made: {error}") from None
    return aside and f"the former run in {folder} is now {aside}"


def _lock(folder: Path) -> None:
    """Lock a folder until this process ends; where its file system has locks."""
    LOCKS.append((folder / LOCK).open("a"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit it
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError from error
