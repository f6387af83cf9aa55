"""Files that a reader finds either as they were or whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


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


def cannot_be_written(path: Path, error: OSError) -> UserError:
    """Return the error that names a file or folder and why it cannot be written."""
    return UserError(
        f"{path} cannot be written: {error.strerror}", "free space or choose another folder"
    )


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
