#!/usr/bin/env python3
"""Convert a COCO folder to sharded TFRecord files.

    python3 coco_to_tfrecord.py --image_dir=coco/train2017 \\
        --object_annotations_file=coco/annotations/instances_train2017.json \\
        --output_file_prefix=tfrecord/train2017 --num_shards=256

Record number i, in the order of the annotation file, goes to shard i mod num_shards. The annotation
file is checked as by the other models' train.py, and what it leaves out is left out here; so is a
box that reaches over the image's edge. Crowd boxes stay. An image whose annotations are for the
picture that its EXIF orientation turns is written upright, since TensorFlow's decoder never turns.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import hashlib
from contextlib import ExitStack, suppress
from typing import NamedTuple

import numpy as np
import simplejpeg
from tqdm import tqdm

from common import flags
from common.coco.images import (
    decode_upright,
    is_annotated_turned,
    stored_size,
    turned_images_line,
)
from common.coco.index import CocoIndex, read_annotations, usable_index
from common.coco.trained import count_boxes
from common.errors import UserError
from common.npu import entry
from ssd_resnet34.tfrecord.example import encode
from ssd_resnet34.tfrecord.records import RecordWriter

# First bytes of the image formats that the reader takes.
FORMATS = {b"\xff\xd8\xff": b"jpeg", b"\x89PNG": b"png"}
REMEDY = "fetch the image again"
CHECK_HINT = "ssd_resnet34/train.py --check_data lists them in full"
UPRIGHT_QUALITY = 95  # of a JPEG that is encoded again, without chroma subsampling


class ImageFile(NamedTuple):
    """The bytes of a record's image."""

    data: bytes
    format: bytes  # jpeg or png
    is_turned: bool  # turned upright and encoded again


def main(argv: list[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--image-dir", type=Path, required=True, help="folder of the images")
    parser.add_argument("--object-annotations-file", type=Path, required=True, help="COCO's JSON")
    parser.add_argument("--output-file-prefix", type=Path, required=True, help="such as train2017")
    parser.add_argument("--num-shards", type=int, default=32, help="files to spread over")
    args = parser.parse_args(argv)
    num_records = convert(
        args.image_dir, args.object_annotations_file, args.output_file_prefix, args.num_shards
    )
    print(f"{num_records} records in {args.num_shards} files {args.output_file_prefix}-*.tfrecord")
    return 0


def convert(image_dir: Path, annotation_file: Path, prefix: Path, num_shards: int) -> int:
    """Write the shards, print what is left out or changed, and return the number of records.

    Raise UserError for bad input; no shard is left then.
    """
    if num_shards < 1:
        raise UserError(f"--num_shards={num_shards}: give 1 or more")
    all_annotations = read_annotations(str(annotation_file), str(image_dir))
    has_annotations = np.diff(all_annotations.offsets) > 0  # usable or not
    index = usable_index(all_annotations, hint=CHECK_HINT)
    for line in index.lines():
        print(line)
    is_over_edge = boxes_over_edge(index)
    print(written_boxes_line(index, is_over_edge))
    num_turned = 0
    with suppress(OSError):  # the writers say what is wrong
        prefix.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers = []
        for shard in range(num_shards):
            writer = RecordWriter(f"{prefix}-{shard:05d}-of-{num_shards:05d}.tfrecord")
            writers.append(stack.enter_context(writer))
        for i in tqdm(range(len(index)), unit="image", disable=None):
            file = read_image_file(index, i)
            features = image_features(index, i, file)
            if has_annotations[i]:
                features |= object_features(index, i, is_over_edge)
            writers[i % num_shards].write(encode(features))
            num_turned += file.is_turned
    if num_turned:
        print(f"{turned_images_line(num_turned, len(index))}, and encoded again")
    return len(index)


def boxes_over_edge(index: CocoIndex) -> np.ndarray:
    """Return which boxes (A,) of an index reach over the edge of their image."""
    x, y, width, height = index.table.box_xywh.T
    num_annotations = np.diff(index.offsets)
    image_heights, image_widths = np.repeat(index.sizes, num_annotations, axis=0).T
    return (x < 0) | (y < 0) | (x + width > image_widths) | (y + height > image_heights)


def written_boxes_line(index: CocoIndex, is_over_edge: np.ndarray) -> str:
    """Return a line that says how many boxes of a file are written, and why not all.

    `index` has the usable annotations, `is_over_edge` (A,) bool says which of them are left out.
    Raise UserError where the file has boxes and none is left.
    """
    count = count_boxes(index, {"over the image's edge": is_over_edge})
    line = count.line("written")
    if count.num_boxes > 0 and count.num_used == 0:
        raise UserError(f"{index.annotation_file}: {line}; there is nothing to train on")
    return line


def read_image_file(index: CocoIndex, i: int) -> ImageFile:
    """Read the file of image `i` for its record: as it is, or turned upright.

    Only the header of a file that stays as it is is read. Raise UserError for a file that cannot be
    read, is neither JPEG nor PNG or has another size than annotated.
    """
    path = index.path(i)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check --image_dir") from None
    name = image_format(data, path)
    height, width = index.sizes[i].tolist()
    is_turned = is_annotated_turned(
        data=data,
        where=path,
        stored=stored_size(data, path, REMEDY),
        size=(height, width),
        far_corner=tuple(index.far_corners[i].tolist()),
        turns_if_both_fit=False,  # TensorFlow's decoder never turns
    )
    if not is_turned:
        return ImageFile(data, name, is_turned=False)
    pixels = decode_upright(data, path, REMEDY)
    jpeg = simplejpeg.encode_jpeg(pixels, UPRIGHT_QUALITY, colorsubsampling="444", fastdct=False)
    return ImageFile(jpeg, b"jpeg", is_turned=True)


def image_format(data: bytes, path: str) -> bytes:
    """Return the name of an image's format. Raise UserError where the reader does not take it."""
    for first_bytes, name in FORMATS.items():
        if data.startswith(first_bytes):
            return name
    raise UserError(f"{path}: neither JPEG nor PNG; convert it, or {REMEDY}")


def image_features(index: CocoIndex, i: int, file: ImageFile) -> dict:
    """Return the features of image `i` alone."""
    height, width = index.sizes[i].tolist()
    return {
        "image/encoded": (bytes, [file.data]),
        "image/format": (bytes, [file.format]),
        "image/filename": (bytes, [bytes(index.file_names[i])]),
        "image/source_id": (bytes, [str(index.image_ids[i]).encode()]),
        "image/key/sha256": (bytes, [hashlib.sha256(file.data).hexdigest().encode()]),
        "image/height": (int, [height]),
        "image/width": (int, [width]),
    }


def object_features(index: CocoIndex, i: int, is_over_edge: np.ndarray) -> dict:
    """Return the features of the boxes of image `i`, normalised; `is_over_edge` (A,) are left out.

    An area that the file does not have is width times height.
    """
    image_height, image_width = index.sizes[i].tolist()
    start, end = index.offsets[i : i + 2]
    annotations = index.table[start:end][~is_over_edge[start:end]]
    x, y, width, height = annotations.box_xywh.T
    areas = np.where(np.isnan(annotations.area), width * height, annotations.area)
    category_ids = []
    names = []
    for label in annotations.label.tolist():
        category_ids.append(index.category_ids[label])
        names.append(index.class_names[label].encode())
    return {
        "image/object/bbox/xmin": (float, (x / image_width).tolist()),
        "image/object/bbox/xmax": (float, ((x + width) / image_width).tolist()),
        "image/object/bbox/ymin": (float, (y / image_height).tolist()),
        "image/object/bbox/ymax": (float, ((y + height) / image_height).tolist()),
        "image/object/class/label": (int, category_ids),
        "image/object/class/text": (bytes, names),
        "image/object/is_crowd": (int, annotations.crowd.astype(int).tolist()),
        "image/object/area": (float, areas.tolist()),
    }


if __name__ == "__main__":
    entry.run(main)
