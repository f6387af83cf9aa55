"""TFRecord files: records back to back, each with two checksums.

A record is its payload's length (uint64), the masked CRC-32C of those 8 bytes (uint32), the
payload, and the payload's masked CRC-32C (uint32), all little endian. Every damage raises a
UserError that names the file, the byte offset of the record and what is wrong.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c

from common.errors import UserError

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
GZIP = b"\x1f\x8b"
REMEDY = "copy or convert the file again"


class Span(NamedTuple):
    """Where a record lies: byte offset of its header, length of its payload."""

    offset: int
    length: int


def masked_crc(data: bytes) -> int:
    """CRC-32C (Castagnoli) rotated right by 15 bits, plus a constant: TensorFlow's masking."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def match_files(pattern: str, flag: str) -> list[str]:
    """The files that a glob pattern matches, sorted. Raises UserError where there is none."""
    files = sorted(path for path in glob(pattern) if os.path.isfile(path))
    if not files:
        raise UserError(f"{flag}={pattern} matches no file; quote it, and check the folder")
    return files


def read_spans(path: str) -> Iterator[Span]:
    """The place of every record in file order; checks headers, skips over payloads."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < size:
            file.seek(offset)
            span = _span(path, offset, file.read(HEADER.size), size)
            yield span
            offset += HEADER.size + span.length + FOOTER.size


def read_record(path: str, span: Span) -> bytes:
    """The payload of one record, its checksum verified."""
    with _opened(path, buffering=0) as file:
        file.seek(span.offset + HEADER.size)
        return _payload(path, span, file)


def read_records(path: str) -> Iterator[bytes]:
    """Every payload in file order, both checksums verified; an empty file has none."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < size:
            span = _span(path, offset, file.read(HEADER.size), size)
            yield _payload(path, span, file)
            offset = file.tell()


def _opened(path: str, buffering: int = -1) -> BinaryIO:
    try:
        return open(path, "rb", buffering)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _span(path: str, offset: int, header: bytes, size: int) -> Span:
    where = f"{path}: record at byte {offset}"
    if offset == 0 and header.startswith(GZIP):
        raise UserError(f"{path}: a gzip file; decompress it, records are read uncompressed only")
    if len(header) < HEADER.size:
        raise UserError(f"{where}: the file ends inside the length; {REMEDY}")
    length, crc = HEADER.unpack(header)
    if masked_crc(header[:8]) != crc:
        raise UserError(f"{where}: wrong checksum of the length; {REMEDY}")
    if offset + HEADER.size + length + FOOTER.size > size:
        raise UserError(f"{where}: the file ends inside the record; {REMEDY}")
    return Span(offset, length)


def _payload(path: str, span: Span, file: BinaryIO) -> bytes:
    where = f"{path}: record at byte {span.offset}"
    payload, footer = file.read(span.length), file.read(FOOTER.size)
    if len(footer) < FOOTER.size:
        raise UserError(f"{where}: the file ends inside the record; {REMEDY}")
    if masked_crc(payload) != FOOTER.unpack(footer)[0]:
        raise UserError(f"{where}: wrong checksum of the content; {REMEDY}")
    return payload


class RecordWriter:
    """Writes a file of records under a temporary name; closed without an error, it is renamed.

    Raises UserError where the file cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with self._writing():
            self._file = self._partial.open("wb")

    def write(self, payload: bytes) -> None:
        length = struct.pack("<Q", len(payload))
        with self._writing():
            self._file.write(length + FOOTER.pack(masked_crc(length)))
            self._file.write(payload)
            self._file.write(FOOTER.pack(masked_crc(payload)))

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            with self._writing():
                self._file.close()
                if kind is None:
                    os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"{self.path}: cannot be written ({error.strerror})"
            raise UserError(f"{reason}; give another place") from None
