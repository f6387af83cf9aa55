"""TFRecord files: records back to back, each with two checksums.

A record is the length of its payload (uint64), the masked CRC-32C of those 8 bytes (uint32), the
payload, and the payload's masked CRC-32C (uint32), all little endian. All damage raises a
UserError that names the file, the byte offset of the record and what is wrong.
"""

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c

from common.errors import UserError
from common.files import cannot_be_written

HEADER = struct.Struct("<QI")  # length, its checksum
FOOTER = struct.Struct("<I")  # checksum of the payload
LENGTH = struct.Struct("<Q")
GZIP_START = b"\x1f\x8b"
REMEDY = "copy or convert the file again"


class Span(NamedTuple):
    """The byte offset of a record's header and the length of its payload."""

    offset: int
    length: int


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) as TensorFlow masks it: rotated right by 15 bits, plus a
    constant."""
    crc = google_crc32c.value(data)
    rotated = crc >> 15 | crc << 17
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def match_files(pattern: str, flag: str) -> list[str]:
    """Return the files that a glob pattern matches, sorted.

    Raise UserError where there is none; it names the flag that the pattern came from.
    """
    files = sorted(path for path in glob(pattern) if os.path.isfile(path))
    if not files:
        raise UserError(f"{flag}={pattern} matches no file; quote it, and check the folder")
    return files


def describe(path: str, offset: int) -> str:
    """Return the file and the position of a record, as error messages begin."""
    return f"{path}: record at byte {offset}"


def read_record(path: str, span: Span) -> bytes:
    """Return the payload of one record, its checksum verified."""
    with _open(path, buffering=0) as file:
        file.seek(span.offset + HEADER.size)
        return _read_payload(path, span, file, verify=True)


def payload_of(record: bytes, path: str, span: Span) -> bytes:
    """Return the payload in the bytes of a record, as `read_record` returns that of its file."""
    return _read_payload(path, span, io.BytesIO(record[HEADER.size :]), verify=True)


def read_records(path: str) -> Iterator[bytes]:
    """Yield every payload in file order, both checksums verified; an empty file has none."""
    for _, payload in scan_records(path, verify=True):
        yield payload


def scan_records(path: str, verify: bool) -> Iterator[tuple[Span, bytes]]:
    """Yield the span and the payload of every record in file order, from one open file.

    Headers are verified, payloads only if `verify` is set.
    """
    with _open(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < file_size:
            span = _read_header(path, offset, file, file_size)
            payload = _read_payload(path, span, file, verify)
            yield span, payload
            offset = file.tell()


def _open(path: str, buffering: int = -1) -> BinaryIO:
    try:
        return open(path, "rb", buffering)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _read_header(path: str, offset: int, file: BinaryIO, file_size: int) -> Span:
    where = describe(path, offset)
    header = file.read(HEADER.size)
    if offset == 0 and header.startswith(GZIP_START):
        raise UserError(f"{path}: a gzip file; decompress it, records are read uncompressed only")
    if len(header) < HEADER.size:
        raise UserError(f"{where}: the file ends inside the length; {REMEDY}")
    length, crc = HEADER.unpack(header)
    if masked_crc(header[: LENGTH.size]) != crc:
        raise UserError(f"{where}: wrong checksum of the length; {REMEDY}")
    if offset + HEADER.size + length + FOOTER.size > file_size:
        raise UserError(f"{where}: the file ends inside the record; {REMEDY}")
    return Span(offset, length)


def _read_payload(path: str, span: Span, file: BinaryIO, verify: bool) -> bytes:
    where = describe(path, span.offset)
    payload = file.read(span.length)
    footer = file.read(FOOTER.size)
    if len(footer) < FOOTER.size:
        raise UserError(f"{where}: the file ends inside the record; {REMEDY}")
    (crc,) = FOOTER.unpack(footer)
    if verify and masked_crc(payload) != crc:
        raise UserError(f"{where}: wrong checksum of the content; {REMEDY}")
    return payload


class RecordWriter:
    """A file of records under a temporary name, which is renamed when it is closed without error.

    Raise UserError where the file cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with self._reporting_failure():
            self._file = self._partial.open("wb")

    def write(self, payload: bytes) -> None:
        length = LENGTH.pack(len(payload))
        with self._reporting_failure():
            self._file.write(length)
            self._file.write(FOOTER.pack(masked_crc(length)))
            self._file.write(payload)
            self._file.write(FOOTER.pack(masked_crc(payload)))

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, exception_type: type | None, *_) -> None:
        try:
            with self._reporting_failure():
                self._file.close()
                if exception_type is None:
                    os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_be_written(self.path, error) from None
