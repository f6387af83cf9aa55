"""TFRecord files: golden content, damage, round trips."""

import errno
import gzip
import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from ssd_resnet34.tfrecord import records
from ssd_resnet34.tfrecord.records import (
    RecordWriter,
    masked_crc,
    match_files,
    read_record,
    read_records,
    scan_records,
)

FILES = (
    "train2017-00000-of-00002.tfrecord",
    "train2017-00001-of-00002.tfrecord",
    "edge-00000-of-00001.tfrecord",
)


def write(path, payloads):
    with RecordWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
    return str(path)


def read_by_span(path):
    return [read_record(path, span) for span, _ in scan_records(path, verify=False)]


def test_masked_crc_of_the_check_string():
    assert masked_crc(b"123456789") == 0xC78AB0E5


@pytest.mark.parametrize("name", FILES)
def test_records_are_tensorflows(golden, golden_dir, name):
    expected = golden("expected")["files"][name]
    payloads = list(read_records(str(golden_dir / name)))
    assert [len(payload) for payload in payloads] == [one["record_bytes"] for one in expected]
    hashes = [hashlib.sha256(payload).hexdigest() for payload in payloads]
    assert hashes == [one["record_sha256"] for one in expected]


@pytest.mark.parametrize("name", FILES)
def test_spans_reach_every_record(golden_dir, name):
    path = str(golden_dir / name)
    assert read_by_span(path) == list(read_records(path))


@pytest.mark.parametrize("name", FILES)
def test_written_files_are_byte_for_byte_tensorflows(golden_dir, tmp_path, name):
    source = golden_dir / name
    write(tmp_path / name, read_records(str(source)))
    assert (tmp_path / name).read_bytes() == source.read_bytes()


def test_an_empty_file_has_no_records(golden_dir):
    path = str(golden_dir / "empty-00000-of-00001.tfrecord")
    assert list(read_records(path)) == []
    assert list(scan_records(path, verify=False)) == []


@pytest.mark.parametrize(
    ("name", "offset", "reason"),
    [
        ("payload_flip", 63151, "wrong checksum of the content"),
        ("truncated", 63151, "the file ends inside the record"),
        ("length_flip", 0, "wrong checksum of the length"),
        ("truncated_header", 5870, "the file ends inside the length"),
    ],
)
def test_golden_damage_is_named_with_its_place(golden, golden_dir, name, offset, reason):
    path = str(golden_dir / "corrupt" / f"{name}.tfrecord")
    line = re.escape(f"{path}: record at byte {offset}: {reason}")
    found = read_records(path)
    for _ in range(golden("expected")["corrupt"][f"{name}.tfrecord"]["records_before_error"]):
        next(found)
    with pytest.raises(UserError, match=line):
        next(found)
    with pytest.raises(UserError, match=line):
        read_by_span(path)


def test_a_gzip_file_is_named_so(tmp_path):
    path = tmp_path / "packed.tfrecord"
    path.write_bytes(gzip.compress(b"records"))
    with pytest.raises(UserError, match="gzip"):
        list(read_records(str(path)))


def test_a_missing_file_and_a_pattern_without_files(tmp_path):
    with pytest.raises(UserError, match=r"gone.*cannot be read"):
        list(read_records(str(tmp_path / "gone")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"--training_file_pattern=.*matches no file"):
        match_files(str(tmp_path / "*"), "--training_file_pattern")


def test_matched_files_are_sorted(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / name).touch()
    assert match_files(str(tmp_path / "*"), "flag") == [str(tmp_path / n) for n in "abc"]


def test_a_failed_writer_leaves_nothing(tmp_path):
    def payloads():
        yield b"one"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write(tmp_path / "file", payloads())
    assert list(tmp_path.iterdir()) == []


def test_a_place_and_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot be written: No such file"):
        RecordWriter(tmp_path / "none" / "file")
    with RecordWriter(tmp_path / "file") as writer:

        class Full:
            def write(self, data):
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(writer, "_file", Full())
            with pytest.raises(
                UserError, match=r"file cannot be written: No space left .*; free space or"
            ):
                writer.write(b"record")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_round_trip(tmp_path_factory, payloads):
    path = write(tmp_path_factory.mktemp("records") / "file", payloads)
    assert list(read_records(path)) == payloads


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), st.data())
def test_any_flipped_bit_and_any_cut_is_found(tmp_path_factory, payloads, data):
    path = tmp_path_factory.mktemp("damage") / "file"
    write(path, payloads)
    content = bytearray(path.read_bytes())
    ends, end = {0}, 0
    for payload in payloads:
        end += records.HEADER.size + len(payload) + records.FOOTER.size
        ends.add(end)
    cut = data.draw(st.integers(0, len(content)))
    if cut == len(content):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    elif cut in ends:  # a whole number of records is a good file
        path.write_bytes(content[:cut])
        assert list(read_records(str(path))) == payloads[: sorted(ends).index(cut)]
        return
    path.write_bytes(content[:cut])
    with pytest.raises(UserError, match=r"record at byte|gzip"):
        list(read_records(str(path)))


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_arbitrary_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record at byte 0|gzip"):
        list(read_records(str(path)))
