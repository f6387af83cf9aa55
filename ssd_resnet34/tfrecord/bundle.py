"""TensorFlow checkpoints (V2 "bundle" format), read without TensorFlow.

`prefix.index` is a sorted table of variable names in LevelDB's format, `prefix.data-SSSSS-of-NNNNN`
holds their raw values. Both are covered by checksums, and every one is verified.
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
from ssd_resnet34.tfrecord.messages import message_classes
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
# Format of the index: LevelDB's table_format.md.
FOOTER_SIZE = 48
MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
BLOCK_TRAILER = struct.Struct("<BI")  # compression, checksum
RESTART = struct.Struct("<I")
MAX_VARINT_BYTES = 10
# The types of a checkpoint of weights, by their number in TensorFlow's DataType.
DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    9: torch.int64,
    14: torch.bfloat16,
    19: torch.float16,
}


# The key of a part of a partitioned variable begins so; it is binary, not a name.
SLICE_KEY = b"\0"


class Bundle:
    """The variables of a checkpoint: `names`, `shape(name)`, `read(name)`."""

    def __init__(self, prefix: str | Path):
        """Read the index. Raise UserError where it is missing or damaged."""
        self.prefix = str(prefix)
        index = f"{self.prefix}.index"
        try:
            table = dict(read_table(_read_bytes(index), index))
            header = _MESSAGES["Header"].FromString(table.pop(b""))
            self._entries = {}
            for name, value in table.items():
                if name.startswith(SLICE_KEY):
                    continue
                self._entries[name.decode()] = _MESSAGES["Entry"].FromString(value)
        except (LookupError, ValueError, OverflowError, struct.error, DecodeError) as error:
            raise UserError(f"{index}: not a table of variables ({error}); copy it again") from None
        if header.endianness:
            raise UserError(f"{index}: written on a big-endian machine; convert it there")
        self._num_shards = header.num_shards

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(dimension.size for dimension in self._entries[name].shape.dim)

    def read(self, name: str) -> Tensor:
        """Return a variable in TensorFlow's layout. Raise UserError for a damaged file."""
        entry = self._entries[name]
        shape = self.shape(name)
        if entry.slices:
            raise UserError(
                f"{self.prefix}: {name} is partitioned into {len(entry.slices)} parts, which is "
                "not read here",
                "save it in one part (tf.train.Saver over variables without a partitioner)",
            )
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{self.prefix}: {name} has TensorFlow's type {entry.dtype}, which is not read here"
            )
        dtype = DTYPES[entry.dtype]
        if not _is_consistent(entry, shape, dtype):
            raise UserError(
                f"{self.prefix}.index: {name}: shape {shape} and {entry.size} bytes do not agree"
            )
        path = f"{self.prefix}.data-{entry.shard_id:05d}-of-{self._num_shards:05d}"
        data = _read_bytes(path, entry.offset, entry.size)
        if len(data) < entry.size:
            raise UserError(f"{path}: ends inside {name}, at byte {entry.offset}; copy it again")
        if masked_crc(data) != entry.crc32c:
            raise UserError(f"{path}: wrong checksum of {name}, at byte {entry.offset}")
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _is_consistent(entry: Message, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    if any(value < 0 for value in (entry.offset, entry.shard_id, *shape)):
        return False
    return entry.size == math.prod(shape) * dtype.itemsize


def find_prefix(path: str | Path) -> str | None:
    """Return the prefix of a TensorFlow checkpoint, or None for an existing file of another format.

    `path` is the prefix, or a folder whose text file `checkpoint` names the newest one. Raise
    UserError where the checkpoint is missing, naming the missing file.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # such as a name that is too long
        problem = f"{path}: cannot be opened ({error.strerror})"
        raise UserError(problem, "check --resnet_checkpoint") from None
    if is_folder:
        path = _newest_prefix(path)
    if path.suffix in (".index", ".meta"):
        path = path.with_suffix("")
    elif path.is_file():
        return None
    prefix = str(path)
    if not Path(f"{prefix}.index").is_file():
        raise UserError(
            f"{prefix}: neither a file nor a TensorFlow checkpoint (no {prefix}.index); "
            "check --resnet_checkpoint"
        )
    if not list(path.parent.glob(f"{path.name}.data-*")):
        raise UserError(f"{prefix}: there is no {prefix}.data-*; copy it beside the .index")
    return prefix


def _newest_prefix(folder: Path) -> Path:
    listing = folder / "checkpoint"
    text = ""
    if listing.is_file():
        text = listing.read_text(errors="replace")
    match = re.search(r'^model_checkpoint_path:\s*"(.+)"', text, re.MULTILINE)
    if match is None:
        raise UserError(f"{folder}: no file `checkpoint` that names one; give its prefix")
    named = folder / match[1]
    if named.with_name(f"{named.name}.index").is_file():
        return named
    # The path may be from another machine.
    return folder / named.name


def _read_bytes(path: str, offset: int = 0, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from None


def read_table(content: bytes, path: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table: an index block points to the data blocks.

    Raise ValueError, IndexError or struct.error for a damaged table, UserError for a compressed
    one.
    """
    footer = content[-FOOTER_SIZE:]
    if not footer.endswith(MAGIC):
        raise ValueError("its last bytes are not a table's")
    # The footer begins with the handle of the meta index block, which is empty.
    _, _, position = read_handle(footer, 0)
    offset, size, _ = read_handle(footer, position)
    for _, handle in _read_block(content, offset, size, path):
        offset, size, _ = read_handle(handle, 0)
        yield from _read_block(content, offset, size, path)


def read_handle(data: bytes, position: int) -> tuple[int, int, int]:
    """Return the offset and the size of a block, and the position after the two."""
    offset, position = read_varint(data, position)
    size, position = read_varint(data, position)
    return offset, size, position


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return an integer of seven bits a byte, the lowest first, and the position after it."""
    value = 0
    for number in range(MAX_VARINT_BYTES):
        byte = data[position + number]
        value |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:  # the highest bit announces another byte
            return value, position + number + 1
    raise ValueError("an integer of more than ten bytes")


def _read_block(content: bytes, offset: int, size: int, path: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block; a key shares its beginning with the one before."""
    block = content[offset : offset + size]
    compression, crc = BLOCK_TRAILER.unpack_from(content, offset + size)
    if masked_crc(content[offset : offset + size + 1]) != crc:  # the compression is covered
        raise ValueError(f"wrong checksum of the block at byte {offset}")
    if compression:
        raise UserError(f"{path}: compressed; save it again without compression")
    # At the end are the positions of keys that share nothing, and their number.
    (num_restarts,) = RESTART.unpack_from(block, size - RESTART.size)
    end = size - RESTART.size * (num_restarts + 1)
    key = b""
    position = 0
    while position < end:
        shared, position = read_varint(block, position)
        unshared, position = read_varint(block, position)
        value_size, position = read_varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + value_size]
        position += value_size
