"""Files that are given as checkpoints and are something else: told by their bytes, each by name."""

import codecs
import json
import zipfile
from pathlib import Path

from common.errors import UserError

HEAD_SIZE = 4096  # bytes that are looked at
TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # of TensorFlow's tables: V1 files and V2 indices
# What torch.save wrote before version 1.6 begins with this number, pickled.
TORCH_BEFORE_1_6 = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LONGEST_BEFORE_NUMBER = 32  # bytes of a pickle before its first number
PICKLE = b"\x80"
HDF5 = b"\x89HDF\r\n\x1a\n"
GIT_LFS = b"version https://git-lfs"
WEB_PAGES = (b"<!doctype html", b"<html")
TORCHSCRIPT_ENTRY = "/constants.pkl"
SAFETENSORS_LENGTH = 8  # bytes of the length of a safetensors file's header, which is JSON


def require_checkpoint(path: str | Path) -> None:
    """Raise UserError, naming the file, for one that torch.save has not written.

    A damaged file passes: reading it shows the damage. Raise OSError where it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(HEAD_SIZE)
        file.seek(max(0, path.stat().st_size - len(TABLE_END)))
        end = file.read()
    kind, remedy = _kind(path, head, end)
    if kind:
        raise UserError(f"checkpoint {path} is {kind}", remedy)


def _kind(path: Path, head: bytes, end: bytes) -> tuple[str, str]:
    """Return what a file is instead, and what to do; two empty texts for what may be torch's."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith(TORCHSCRIPT_ENTRY) for name in archive.namelist()):
                return "TorchScript, a program", "give the state dict of the network that it was of"
        return "", ""
    if end == TABLE_END:
        if path.suffix == ".index":
            return (
                "the index of a TensorFlow checkpoint",
                "ssd_resnet34/tfrecord reads it with --resnet_checkpoint, the other models do not",
            )
        return (
            "a TensorFlow V1 checkpoint",
            "write it again as V2 (tf.train.Saver(write_version=tf.train.SaverDef.V2))",
        )
    if ".data-" in path.name and path.with_name(_index_name(path)).is_file():
        return "a part of a TensorFlow checkpoint", "give what its name is without .data-..."
    if head.startswith(HDF5):
        return "an HDF5 file, such as Keras writes", "give PyTorch's weights"
    if head.startswith(PICKLE) and TORCH_BEFORE_1_6 not in head[:LONGEST_BEFORE_NUMBER]:
        return (
            "a plain pickle, such as Detectron2's R-50.pkl",
            "write its arrays as tensors under this network's names with torch.save",
        )
    if head.startswith(GIT_LFS):
        return "a pointer of Git LFS, not the file itself", "fetch it with: git lfs pull"
    if head.lstrip().lower().startswith(WEB_PAGES):
        return "a web page, not what it was to be", "download the file again"
    if head and _is_text(head):
        return "a text file", "give a checkpoint"
    return "", ""


def _index_name(path: Path) -> str:
    return path.name.partition(".data-")[0] + ".index"


def _is_text(head: bytes) -> bool:
    """Return whether the first bytes of a file are UTF-8 without control characters."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(head)  # a last character that is cut may remain
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)


def is_safetensors(path: str | Path) -> bool:
    """Return whether a file begins with the header of the format safetensors."""
    path = Path(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(SAFETENSORS_LENGTH), "little")
        if not 2 <= length <= path.stat().st_size - SAFETENSORS_LENGTH:
            return False
        if file.read(1) != b"{":
            return False
        file.seek(SAFETENSORS_LENGTH)
        try:
            return isinstance(json.loads(file.read(length)), dict)
        except ValueError:
            return False
