"""Files that a reader finds either as they were or whole."""

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: bytes) -> Path:
    """Write beside `path`, then rename; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
