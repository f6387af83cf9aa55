"""Files that a reader finds either as they were or whole."""

import errno
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

WHOLE_FILE = -1  # in the place of a length
OPEN_FILES = 65536  # that a process may have, where its hard limit allows it
MORE_FILES = f"raise the limit with `ulimit -n {OPEN_FILES}`, or lower --num_workers"
ANOTHER_DISK = "free space or choose another folder"
# What a user can do about an OSError of writing; in all other cases another folder is the advice.
REMEDIES = {
    errno.ENOSPC: ANOTHER_DISK,
    errno.EDQUOT: ANOTHER_DISK,
    errno.EROFS: "that disk can only be read: choose a folder on another",
    errno.EACCES: "choose a folder in which you may write, or change its permissions",
    errno.EPERM: "choose a folder in which you may write, or change its permissions",
    errno.EEXIST: "a file is where a folder should be: rename it or choose another folder",
    errno.ENOTDIR: "a file is where a folder should be: rename it or choose another folder",
    errno.EMFILE: MORE_FILES,
    errno.ENFILE: MORE_FILES,
    errno.ENAMETOOLONG: "choose a shorter name",
}


class Extent(NamedTuple):
    """Bytes of a file that a loader reads at once."""

    path: str
    offset: int = 0
    length: int = WHOLE_FILE


def encoded(text: str) -> bytes:
    """Return a text as UTF-8.

    A byte of a path that is no UTF-8 is a lone surrogate in a text: it is escaped.
    """
    return text.encode(errors="backslashreplace")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside `path`, then rename it; the folder is made where it is missing.

    Raise UserError where that fails, as on a full disk.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise cannot_be_written(path, error) from None
    finally:
        if partial.exists():
            partial.unlink()


def write_figure(path: Path | str, figure, dots_per_inch: int) -> None:
    """Write a matplotlib figure as a PNG file, atomically."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dots_per_inch)
    write_atomically(path, picture.getvalue())


def require_writable(folder: Path) -> None:
    """Raise UserError where files cannot be written in a folder, which is made where missing.

    That is asked before hours of work whose result is to be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a full disk still makes empty files")
    except OSError as error:
        raise cannot_be_written(folder, error) from None


def cannot_be_written(path: Path | str, error: OSError) -> UserError:
    """Return the error that names a file or folder, why it cannot be written, and the remedy."""
    remedy = REMEDIES.get(error.errno, "choose another folder")
    return UserError(f"{path} cannot be written: {error.strerror or error}", remedy)


class HeldBackErrors:
    """Holds back the UserErrors of some steps, so that the steps after them are done as well."""

    def __init__(self) -> None:
        self._errors: list[UserError] = []

    @contextmanager
    def hold_back(self) -> Iterator[None]:
        """Hold back a UserError of the block."""
        try:
            yield
        except UserError as error:
            self._errors.append(error)

    def raise_first(self) -> None:
        """Raise the first error that was held back, if any."""
        if self._errors:
            raise self._errors[0]
