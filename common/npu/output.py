"""The output folder of a run: claimed by one run at a time, never overwritten."""

import errno
import fcntl
import glob
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from common.errors import UserError
from common.files import cannot_be_written

LOCK_FILE = ".lock"
# The names by which a folder is known to hold a run or its evaluation. The lock is not among them:
# a run that was refused leaves nothing but that.
RUN_FILES = (
    "train_*.log",
    "*.log.json",
    "iter_*.pt",
    "iter_*.pt.superseded",
    "best.pt",
    "tensorboard",
    "metrics.json",
    "results.bbox.json",
)
TIME_STAMP = "_%Y%m%d_%H%M%S_%f"  # at the end of the name of a former run's folder
MOUNT_POINT = "it is a mount point"
_held_locks = []  # open files: a lock lasts as long as its file is open


def claim_output_folder(folder: Path, goes_on: bool, inputs: Iterable[str] = ()) -> list[str]:
    """Take a folder for this process alone.

    Unless the run `goes_on` there, a folder that holds a former run is renamed with its time
    stamp; return the lines that say so. Of a link that is the folder it stands for: the link stays.
    Other files than a run's are left where they are. Raise UserError where another process works
    in the folder, it cannot be made, or the former run cannot be renamed, as where one of `inputs`,
    the files and folders that the run reads, is in it.
    """
    messages = []
    actual = folder.resolve()
    try:
        if not goes_on and _holds_a_run(actual):
            _require_renamable(folder, inputs)
            _lock(actual)
            moved = _rename_with_time(actual)
            messages.append(f"the former run in {folder} is now {moved}")
        actual.mkdir(parents=True, exist_ok=True)
        _lock(actual)
    except BlockingIOError:
        raise UserError(f"--output_dir {folder}: a running process uses it; name another") from None
    except OSError as error:
        raise cannot_be_written(f"--output_dir {folder}", error) from None
    return messages


def release_output_folders() -> None:
    """Let others have the folders that this process has claimed."""
    while _held_locks:
        _held_locks.pop().close()


def _holds_a_run(folder: Path) -> bool:
    return folder.is_dir() and any(next(folder.glob(name), None) for name in RUN_FILES)


def _require_renamable(folder: Path, inputs: Iterable[str]) -> None:
    """Raise UserError where something else than a former run would be moved with its folder."""
    actual = folder.resolve()
    if Path.cwd().is_relative_to(actual):
        raise _cannot_be_renamed(folder, "the current folder is in it")
    for path in map(Path, inputs):
        # The path itself may lead through a link in the folder.
        through_link = path.absolute().is_relative_to(folder.absolute())
        if through_link or path.resolve().is_relative_to(actual):
            raise _cannot_be_renamed(folder, f"this run reads {path}, which is in it")
    if actual.is_mount():
        raise _cannot_be_renamed(folder, MOUNT_POINT, "name a folder in it")


def _cannot_be_renamed(folder: Path, reason: str, remedy: str = "name another folder") -> UserError:
    return UserError(
        f"--output_dir {folder} holds a former run and cannot be renamed: {reason}",
        f"{remedy}, or go on with that run by --resume=auto",
    )


def _rename_with_time(folder: Path) -> Path:
    changed = datetime.fromtimestamp(folder.stat().st_mtime)
    target = folder.with_name(folder.name + changed.strftime(TIME_STAMP))
    try:
        return folder.rename(target)
    except OSError as error:
        if error.errno == errno.EBUSY:  # a folder of the same disk, mounted once more
            raise _cannot_be_renamed(folder, MOUNT_POINT, "name a folder in it") from None
        raise _cannot_be_renamed(folder, error.strerror) from None


def renamed_folders(folder: Path) -> list[Path]:
    """Return the folders of former runs that `claim_output_folder` has renamed, newest first."""
    actual = folder.resolve()
    renamed = []
    for neighbour in actual.parent.glob(f"{glob.escape(actual.name)}_*"):
        try:
            datetime.strptime(neighbour.name.removeprefix(actual.name), TIME_STAMP)
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
