"""Files that a reader finds either as they were or whole."""

import os
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
        raise UserError(
            f"{path} cannot be written: {error.strerror}; free space or choose another folder"
        ) from None
    finally:
        if partial.exists():
            partial.unlink()
