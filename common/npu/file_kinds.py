"""Files that are given as checkpoints and are something else: told by their bytes, each by name."""

import json
import re
import zipfile
from pathlib import Path

from common.errors import UserError

HEAD_SIZE = 4096  # bytes that are looked at
TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # of TensorFlow's tables: V1 files and V2 indices
# What torch.save wrote before version 1.6 begins with this number, pickled.
TORCH_BEFORE_1_6 = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LONGEST_BEFORE_NUMBER = 32  # bytes of a pickle before its first number
PICKLE = b"\x80"
WRITTEN_BY_TORCH = (b"PK\x03\x04", PICKLE)  # the beginnings: since version 1.6, and before
# How the protocols 0 and 1 begin, which have no mark of their own: with a container that is
# remembered, or with the name of a class.
EARLY_PICKLE = re.compile(
    rb"\([dl]p\d+\n|[]}]q.|c[\w.]+\n[\w.]+\n(p\d+\n|q.|\()", re.ASCII | re.DOTALL
)
PICKLE_END = b"."
HDF5 = b"\x89HDF\r\n\x1a\n"
NUMPY = b"\x93NUMPY"
# Major and minor version of Darknet's files: 0.1 or 0.2, int32 in little endian.
DARKNET = re.compile(rb"\0{4}[\1\2]\0{3}")
# The version of ONNX's format, field 1 of its message, and the key of a further field.
ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]")
TAR = b"ustar"
TAR_OFFSET = 257  # bytes before it
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
}
IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
# TensorFlow's text file `checkpoint`, which names the newest checkpoint of its folder.
TENSORFLOW_LISTING = b"model_checkpoint_path:"
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
# What no text has, in any encoding that keeps ASCII: control characters, without white space and
# the escapes of a terminal's log.
CONTROL_CHARACTERS = re.compile(rb"[\0-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
AS_TENSORS = "write its arrays as tensors under this network's names with torch.save"
GIT_LFS = b"version https://git-lfs"
WEB_PAGES = (b"<!doctype html", b"<html")
# Ends of the names of entries in zip archives, which tell what wrote them.
TORCHSCRIPT_ENTRY = "/constants.pkl"
TORCH_EXPORT_ENTRIES = ("/archive_format", "serialized_exported_program.json")
TORCH_ENTRIES = ("/data.pkl", "/data/0", "/byteorder")
NUMPY_ENTRY = ".npy"
KERAS_ENTRY = "model.weights.h5"
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
            return _kind_of_archive(archive.namelist())
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
        return "a plain pickle, such as Detectron2's R-50.pkl", AS_TENSORS
    if EARLY_PICKLE.match(head) and end.endswith(PICKLE_END):
        return "a plain pickle of an early protocol", AS_TENSORS
    if head.startswith(NUMPY):
        return "an array of NumPy", AS_TENSORS
    if DARKNET.match(head):
        return "a file of Darknet's weights, such as YOLO's", "give PyTorch's weights"
    if ONNX.match(head):
        return "an ONNX graph", "give the checkpoint that it was exported from"
    if head[TAR_OFFSET:].startswith(TAR):
        return "a tar archive", "unpack it and give the checkpoint in it"
    for beginning, name in COMPRESSED.items():
        if head.startswith(beginning):
            return f"a file compressed with {name}", "unpack it and give the checkpoint in it"
    if head.startswith(IMAGES):
        return "an image", "give weights here, images after them or with --img"
    if head.startswith(GIT_LFS):
        return "a pointer of Git LFS, not the file itself", "fetch it with: git lfs pull"
    if head.lstrip().lower().startswith(WEB_PAGES):
        return "a web page, not what it was to be", "download the file again"
    if head.startswith(TENSORFLOW_LISTING):
        return (
            "TensorFlow's list of the checkpoints in a folder",
            "give the folder, to ssd_resnet34/tfrecord with --resnet_checkpoint; the other models "
            "do not read TensorFlow's checkpoints",
        )
    if head and _is_text(head):
        return "a text file", "give a checkpoint"
    if head and not head.startswith(WRITTEN_BY_TORCH):
        return (
            "of no kind that can be read as a checkpoint",
            "give a file of torch.save or of safetensors; if it was one, use another copy",
        )
    return "", ""


def _kind_of_archive(names: list[str]) -> tuple[str, str]:
    """Return the same of a zip archive, by the names of its entries."""
    if any(name.endswith(TORCHSCRIPT_ENTRY) for name in names):
        return "TorchScript, a program", "give the state dict of the network that it was of"
    if any(name.endswith(TORCH_EXPORT_ENTRIES) for name in names):
        return "a program of torch.export", "give the state dict of the network that it was of"
    if any(name.endswith(TORCH_ENTRIES) for name in names):
        return "", ""
    if KERAS_ENTRY in names:
        return "a model of Keras", "give PyTorch's weights"
    if names and all(name.endswith(NUMPY_ENTRY) for name in names):
        return "an archive of NumPy's arrays", AS_TENSORS
    return "a zip archive of other files", "unpack it and give the checkpoint in it"


def _index_name(path: Path) -> str:
    return path.name.partition(".data-")[0] + ".index"


def _is_text(head: bytes) -> bool:
    """Return whether the first bytes of a file are text: UTF-8, UTF-16, GBK, Latin-1 and so on."""
    if head.startswith(BYTE_ORDER_MARKS):
        whole = head[: len(head) - len(head) % 2]
        head = whole.decode("utf-16", errors="replace").encode("utf-8", errors="replace")
    return CONTROL_CHARACTERS.search(head) is None


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
