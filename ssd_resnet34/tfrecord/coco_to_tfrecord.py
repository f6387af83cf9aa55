#!/usr/bin/env python3
"""Convert a COCO folder to sharded TFRecord files.

    python3 coco_to_tfrecord.py --image_dir=coco/train2017 \\
        --object_annotations_file=coco/annotations/instances_train2017.json \\
        --output_file_prefix=tfrecord/train2017 --num_shards=256

Record number i, in the order of the annotation file, goes to shard i mod num_shards. A box that is
empty or reaches over the image's edge is left out; crowd boxes stay.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

import hashlib
import json
from contextlib import ExitStack, suppress
from typing import NamedTuple

from tqdm import tqdm

from common import flags
from common.errors import UserError
from common.npu import entry
from ssd_resnet34.tfrecord.example import encode
from ssd_resnet34.tfrecord.records import RecordWriter

# First bytes of the image formats that the reader takes.
FORMATS = {b"\xff\xd8\xff": b"jpeg", b"\x89PNG": b"png"}
# What unusable entries of the annotation file raise.
UNUSABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class Annotations(NamedTuple):
    """An annotation file, its entries unchecked."""

    images: list[dict]  # in file order
    by_image: dict[int, list[dict]]  # annotations by image id
    names: dict[int, str]  # by category id


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
    """Write the shards and return the number of records.

    Raise UserError for bad input; no shard is left then.
    """
    if num_shards < 1:
        raise UserError(f"--num_shards={num_shards}: give 1 or more")
    annotations = read_annotations(annotation_file)
    with suppress(OSError):  # the writers say what is wrong
        prefix.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers = []
        for shard in range(num_shards):
            writer = RecordWriter(f"{prefix}-{shard:05d}-of-{num_shards:05d}.tfrecord")
            writers.append(stack.enter_context(writer))
        for number, image in enumerate(tqdm(annotations.images, unit="image", disable=None)):
            try:
                payload = encode_image(image, annotations, image_dir)
            except UNUSABLE as error:
                raise UserError(
                    f"{annotation_file}: image number {number} or one of its annotations "
                    f"is unusable ({error!r}); correct it"
                ) from None
            writers[number % num_shards].write(payload)
    return len(annotations.images)


def read_annotations(path: Path) -> Annotations:
    """Read an annotation file. Raise UserError for another file."""
    try:
        coco = json.loads(path.read_bytes())
        images = coco["images"]
        if not images or not isinstance(images, list):
            raise TypeError
        by_image = {}
        for annotation in coco["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        names = {category["id"]: category["name"] for category in coco["categories"]}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give an instances_*.json file") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        reason = "no images, annotations and categories in JSON, or cut short"
        raise UserError(f"{path}: {reason}; give an instances_*.json file") from None
    return Annotations(images, by_image, names)


def encode_image(image: dict, annotations: Annotations, image_dir: Path) -> bytes:
    """Return the payload of an image's record.

    An image without annotations has no box features. Raise UserError for an image file that cannot
    be read, one of UNUSABLE for entries that cannot be used.
    """
    path = image_dir / image["file_name"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check --image_dir") from None
    features = image_features(image, data)
    if image["id"] in annotations.by_image:
        of_image = annotations.by_image[image["id"]]
        features |= object_features(image, of_image, annotations.names)
    return encode(features)


def image_features(image: dict, data: bytes) -> dict:
    """Return the features of an image alone; `image` is its entry, `data` its file."""
    if min(image["height"], image["width"]) < 1:
        raise ValueError("an image without extent")
    return {
        "image/encoded": (bytes, [data]),
        "image/format": (bytes, [image_format(image, data)]),
        "image/filename": (bytes, [image["file_name"].encode()]),
        "image/source_id": (bytes, [str(image["id"]).encode()]),
        "image/key/sha256": (bytes, [hashlib.sha256(data).hexdigest().encode()]),
        "image/height": (int, [image["height"]]),
        "image/width": (int, [image["width"]]),
    }


def image_format(image: dict, data: bytes) -> bytes:
    for first_bytes, name in FORMATS.items():
        if data.startswith(first_bytes):
            return name
    raise UserError(f"{image['file_name']}: neither JPEG nor PNG; fetch the image again")


def object_features(image: dict, annotations: list[dict], names: dict[int, str]) -> dict:
    """Return the features of an image's boxes, normalised; `names` by category id."""
    width = image["width"]
    height = image["height"]
    xmin = []
    ymin = []
    xmax = []
    ymax = []
    category_ids = []
    texts = []
    crowd = []
    areas = []
    for annotation in annotations:
        x, y, box_width, box_height = annotation["bbox"]
        empty = box_width <= 0 or box_height <= 0
        outside = x < 0 or y < 0 or x + box_width > width or y + box_height > height
        if empty or outside:
            continue
        xmin.append(x / width)
        ymin.append(y / height)
        xmax.append((x + box_width) / width)
        ymax.append((y + box_height) / height)
        category_ids.append(annotation["category_id"])
        texts.append(names[annotation["category_id"]].encode())
        crowd.append(annotation["iscrowd"])
        areas.append(annotation["area"])
    return {
        "image/object/bbox/xmin": (float, xmin),
        "image/object/bbox/xmax": (float, xmax),
        "image/object/bbox/ymin": (float, ymin),
        "image/object/bbox/ymax": (float, ymax),
        "image/object/class/label": (int, category_ids),
        "image/object/class/text": (bytes, texts),
        "image/object/is_crowd": (int, crowd),
        "image/object/area": (float, areas),
    }


if __name__ == "__main__":
    entry.run(main)
