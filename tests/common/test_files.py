import errno
import tempfile

import pytest

from common.errors import UserError
from common.files import require_writable, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is not bytes")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(
        UserError, match=r"file/x cannot be written: .*; free space or choose another folder"
    ):
        write_atomically(tmp_path / "file" / "x", b"new")


def test_a_folder_is_asked_for_before_the_work(tmp_path, monkeypatch):
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(UserError, match=r"/file cannot be written: File exists; free space or"):
        require_writable(tmp_path / "file")

    def full(dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; free space"):
        require_writable(tmp_path)
