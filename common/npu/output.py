"""The output folder of a run: claimed by one run at a time, never overwritten."""

import errno
import fcntl
import glob
from datetime import datetime
from pathlib import Path

from common.errors import UserError

LOCK_FILE = ".lock"
TIME_STAMP = "_%Y%m%d_%H%M%S_%f"  # at the end of the name of a former run's folder
_held_locks = []  # open files: a lock lasts as long as its file is open


def claim_output_folder(folder: Path, goes_on: bool) -> list[str]:
    """Take a folder for this process alone.

    Unless the run `goes_on` there, a folder that a former run has filled is renamed with its time
    stamp; return the lines that say so. Raise UserError where another process works in the folder
    or it cannot be made.
    """
    messages = []
    try:
        if not goes_on and _holds_a_run(folder):
            _lock(folder)
            moved = folder.rename(_name_with_time(folder))
            messages.append(f"the former run in {folder} is now {moved}")
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
    except BlockingIOError:
        raise UserError(f"--output_dir {folder}: a running process uses it; name another") from None
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made: {error}") from None
    return messages


def release_output_folders() -> None:
    """Let others have the folders that this process has claimed."""
    while _held_locks:
        _held_locks.pop().close()


def _holds_a_run(folder: Path) -> bool:
    return folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())


def _name_with_time(folder: Path) -> Path:
    changed = datetime.fromtimestamp(folder.stat().st_mtime)
    return folder.with_name(folder.name + changed.strftime(TIME_STAMP))


def renamed_folders(folder: Path) -> list[Path]:
    """Return the folders of former runs that `claim_output_folder` has renamed, newest first."""
    renamed = []
    for neighbour in folder.absolute().parent.glob(f"{glob.escape(folder.name)}_*"):
        try:
            datetime.strptime(neighbour.name.removeprefix(folder.name), TIME_STAMP)
        except ValueError:
            continue  # a folder of another name
        renamed.append(neighbour)
    return sorted(renamed, reverse=True)


def _lock(folder: Path) -> None:
    """Lock a folder until this process ends, where its file system has locks.

    Loader workers do not inherit the lock. Raise BlockingIOError where another process has it.
    """
    file = (folder / LOCK_FILE).open("a")
    _held_locks.append(file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError from error
