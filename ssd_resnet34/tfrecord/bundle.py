"""TensorFlow checkpoints (V2 "bundle" format), read without TensorFlow.

`prefix.index` is a sorted table of variable names, `prefix.data-SSSSS-of-NNNNN` holds their raw
values. Both are covered by checksums, and every one is verified.
"""

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from common.errors import UserError
from ssd_resnet34.tfrecord.messages import message_classes, varint
from ssd_resnet34.tfrecord.records import masked_crc

_MESSAGES = message_classes("""
    name: "bundle"
    message_type { name: "Header"
        field { name: "num_shards" number: 1 type: TYPE_INT32 label: LABEL_OPTIONAL }
        field { name: "endianness" number: 2 type: TYPE_INT32 label: LABEL_OPTIONAL } }
    message_type { name: "Dimension"
        field { name: "size" number: 1 type: TYPE_INT64 label: LABEL_OPTIONAL } }
    message_type { name: "Shape"
        field { name: "dim" number: 2 type: TYPE_MESSAGE type_name: ".Dimension"
            label: LABEL_REPEATED } }
    message_type { name: "Entry"
        field { name: "dtype" number: 1 type: TYPE_INT32 label: LABEL_OPTIONAL }
        field { name: "shape" number: 2 type: TYPE_MESSAGE type_name: ".Shape"
            label: LABEL_OPTIONAL }
        field { name: "shard_id" number: 3 type: TYPE_INT32 label: LABEL_OPTIONAL }
        field { name: "offset" number: 4 type: TYPE_INT64 label: LABEL_OPTIONAL }
        field { name: "size" number: 5 type: TYPE_INT64 label: LABEL_OPTIONAL }
        field { name: "crc32c" number: 6 type: TYPE_FIXED32 label: LABEL_OPTIONAL }
        field { name: "slices" number: 7 type: TYPE_BYTES label: LABEL_REPEATED } }
""")
FOOTER_SIZE = 48
MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
# Of TensorFlow's DataType, what a checkpoint of weights holds.
DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    9: torch.int64,
    14: torch.bfloat16,
    19: torch.float16,
}


class Bundle:
    """The variables of a checkpoint: `names`, `shape(name)`, `read(name)`."""

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        index = f"{self.prefix}.index"
        try:
            table = dict(_table(_content(index), index))
            self._entries = {
                name.decode(): _MESSAGES["Entry"].FromString(value)
                for name, value in table.items()
                if name
            }
            header = _MESSAGES["Header"].FromString(table[b""])
        except (LookupError, ValueError, OverflowError, struct.error, DecodeError) as error:
            raise UserError(f"{index}: not a table of variables ({error}); copy it again") from None
        if header.endianness:
            raise UserError(f"{index}: written on a big-endian machine; convert it there")
        self._shards = header.num_shards

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim.size for dim in self._entries[name].shape.dim)

    def read(self, name: str) -> Tensor:
        """The value, in TensorFlow's layout. Raises UserError for a missing or damaged file."""
        entry, shape = self._entries[name], self.shape(name)
        path = f"{self.prefix}.data-{entry.shard_id:05d}-of-{self._shards:05d}"
        dtype = DTYPES.get(entry.dtype)
        if dtype is None or entry.slices:
            kind = "is partitioned" if entry.slices else f"has TensorFlow's type {entry.dtype}"
            raise UserError(f"{self.prefix}: {name} {kind}, which is not read here")
        _check_place(entry, shape, dtype, f"{self.prefix}.index: {name}")
        data = _content(path, entry.offset, entry.size)
        if len(data) < entry.size:
            raise UserError(f"{path}: ends inside {name}, at byte {entry.offset}; copy it again")
        if masked_crc(data) != entry.crc32c:
            raise UserError(f"{path}: wrong checksum of {name}, at byte {entry.offset}")
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def find_prefix(path: str | Path) -> str | None:
    """The prefix of a TensorFlow checkpoint: `path` itself, or the one that the text file
    `checkpoint` in the folder `path` names; None for an existing file, which is of another kind.

    Raises UserError where there is none, naming the file that is missing.
    """
    path = Path(path)
    if path.is_dir():
        path = _newest(path)
    elif path.is_file() and path.suffix not in (".index", ".meta"):
        return None
    prefix = str(path.with_suffix("")) if path.suffix in (".index", ".meta") else str(path)
    if not Path(f"{prefix}.index").is_file():
        raise UserError(f"{prefix}: there is no {prefix}.index; give the checkpoint's prefix")
    if not list(path.parent.glob(f"{Path(prefix).name}.data-*")):
        raise UserError(f"{prefix}: there is no {prefix}.data-*; copy it beside the .index")
    return prefix


def _newest(folder: Path) -> Path:
    listing = folder / "checkpoint"
    text = listing.read_text(errors="replace") if listing.is_file() else ""
    found = re.search(r'^model_checkpoint_path:\s*"(.+)"', text, re.MULTILINE)
    if not found:
        raise UserError(f"{folder}: no file `checkpoint` that names one; give its prefix")
    named = folder / found[1]
    # The path may be from another machine.
    return named if named.with_name(f"{named.name}.index").is_file() else folder / named.name


def _content(path: str, offset: int = 0, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from None


def _check_place(entry: Message, shape: tuple, dtype: torch.dtype, where: str) -> None:
    sound = min((0, entry.offset, entry.shard_id, *shape)) == 0
    if not sound or entry.size != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{where}: shape {shape} and {entry.size} bytes do not agree")


def _table(content: bytes, path: str) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a table: an index block whose values are the places of data blocks."""
    footer = content[-FOOTER_SIZE:]
    if not footer.endswith(MAGIC):
        raise ValueError("its last bytes are not a table's")
    _, _, at = _handle(footer, 0)  # of the meta index, which is empty
    offset, size, _ = _handle(footer, at)
    for _, handle in _block(content, offset, size, path):
        offset, size, _ = _handle(handle, 0)
        yield from _block(content, offset, size, path)


def _block(content: bytes, offset: int, size: int, path: str) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a block; each key shares its beginning with the one before."""
    block = content[offset : offset + size]
    compression, crc = struct.unpack_from("<BI", content, offset + size)
    if masked_crc(content[offset : offset + size + 1]) != crc:
        raise ValueError(f"wrong checksum of the block at byte {offset}")
    if compression:
        raise UserError(f"{path}: compressed; save it again without compression")
    (restarts,) = struct.unpack_from("<I", block, size - 4)
    key, at, end = b"", 0, size - 4 * (restarts + 1)
    while at < end:
        shared, at = varint(block, at)
        unshared, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        yield key, block[at + unshared : at + unshared + length]
        at += unshared + length


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """Offset and size of a block, and the place after them."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return offset, size, at
