import errno
import os
import tempfile

import pytest

from common.errors import UserError
from common.files import cannot_be_written, encoded, require_writable, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is not bytes")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    message = "file/x cannot be written: File exists; a file is where a folder should be: rename it"
    with pytest.raises(UserError, match=message):
        write_atomically(tmp_path / "file" / "x", b"new")


def test_a_folder_is_asked_for_before_the_work(tmp_path, monkeypatch):
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(UserError, match=r"/file cannot be written: File exists; a file is where"):
        require_writable(tmp_path / "file")

    def full(dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; free space"):
        require_writable(tmp_path)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space or choose another folder"),
        (errno.EDQUOT, "free space or choose another folder"),
        (errno.EROFS, "that disk can only be read: choose a folder on another"),
        (errno.EACCES, "choose a folder in which you may write, or change its permissions"),
        (errno.ENOTDIR, "a file is where a folder should be: rename it or choose another folder"),
        (errno.EMFILE, "raise the limit with `ulimit -n 65536`, or lower --num_workers"),
        (errno.EIO, "choose another folder"),
    ],
)
def test_the_remedy_fits_the_reason(number, remedy):
    reason = os.strerror(number)
    error = cannot_be_written("run", OSError(number, reason))
    assert str(error) == f"run cannot be written: {reason}; {remedy}"


def test_a_name_that_is_no_utf8_is_written_escaped():
    gbk = os.fsdecode("数据".encode("gbk"))
    assert encoded(f"数据 {gbk}") == "数据 ".encode() + rb"\udcca\udcfd\udcbe\udcdd"
