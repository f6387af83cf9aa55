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

from tqdm import tqdm

from common.errors import UserError
from common.npu import cli, entry
from ssd_resnet34.tfrecord.example import encode
from ssd_resnet34.tfrecord.records import RecordWriter

# First bytes of the image formats that the reader takes.
FORMATS = {b"\xff\xd8\xff": b"jpeg", b"\x89PNG": b"png"}


def image_features(image: dict, data: bytes) -> dict:
    """Features of an image alone; `image` as in the annotation file, `data` its file."""
    formats = [name for magic, name in FORMATS.items() if data.startswith(magic)]
    if not formats:
        raise UserError(f"{image['file_name']}: neither JPEG nor PNG; fetch the image again")
    if min(image["height"], image["width"]) < 1:
        raise ValueError("an image without extent")
    return {
        "image/encoded": (bytes, [data]),
        "image/format": (bytes, formats),
        "image/filename": (bytes, [image["file_name"].encode()]),
        "image/source_id": (bytes, [str(image["id"]).encode()]),
        "image/key/sha256": (bytes, [hashlib.sha256(data).hexdigest().encode()]),
        "image/height": (int, [image["height"]]),
        "image/width": (int, [image["width"]]),
    }


def object_features(image: dict, annotations: list[dict], names: dict[int, str]) -> dict:
    """Features of an image's boxes; `names` by category id."""
    width, height = image["width"], image["height"]
    kept = [one for one in annotations if _inside(one["bbox"], width, height)]
    boxes = [one["bbox"] for one in kept]
    categories = [one["category_id"] for one in kept]
    return {
        "image/object/bbox/xmin": (float, [x / width for x, _, _, _ in boxes]),
        "image/object/bbox/xmax": (float, [(x + w) / width for x, _, w, _ in boxes]),
        "image/object/bbox/ymin": (float, [y / height for _, y, _, _ in boxes]),
        "image/object/bbox/ymax": (float, [(y + h) / height for _, y, _, h in boxes]),
        "image/object/class/label": (int, categories),
        "image/object/class/text": (bytes, [names[category].encode() for category in categories]),
        "image/object/is_crowd": (int, [one["iscrowd"] for one in kept]),
        "image/object/area": (float, [one["area"] for one in kept]),
    }


def _inside(box: list[float], width: int, height: int) -> bool:
    x, y, w, h = box
    return w > 0 and h > 0 and x >= 0 and y >= 0 and x + w <= width and y + h <= height


def convert(image_dir: Path, annotation_file: Path, prefix: Path, num_shards: int) -> int:
    """Write the shards; the number of records. Raises UserError for bad input, leaving none."""
    if num_shards < 1:
        raise UserError(f"--num_shards={num_shards}: give 1 or more")
    images, annotations, names = _read_annotations(annotation_file)
    with suppress(OSError):  # the writers say what is wrong
        prefix.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        names_of_shards = (f"{prefix}-{k:05d}-of-{num_shards:05d}" for k in range(num_shards))
        writers = [
            stack.enter_context(RecordWriter(f"{name}.tfrecord")) for name in names_of_shards
        ]
        for i, image in enumerate(tqdm(images, unit="image", disable=None)):
            try:
                path = image_dir / image["file_name"]
                features = image_features(image, path.read_bytes())
                if image["id"] in annotations:
                    features |= object_features(image, annotations[image["id"]], names)
                payload = encode(features)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; check --image_dir") from None
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                where = f"{annotation_file}: image number {i} or one of its annotations"
                raise UserError(f"{where} is unusable ({error!r}); correct it") from None
            writers[i % num_shards].write(payload)
    return len(images)


def _read_annotations(path: Path) -> tuple[list[dict], dict[int, list[dict]], dict[int, str]]:
    """Images in file order, annotations by image id, names by category id."""
    try:
        coco = json.loads(path.read_bytes())
        images, annotations = coco["images"], {}
        if not (images and isinstance(images, list)):
            raise TypeError
        for annotation in coco["annotations"]:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
        return images, annotations, {one["id"]: one["name"] for one in coco["categories"]}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give an instances_*.json file") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        reason = "no images, annotations and categories in JSON, or cut short"
        raise UserError(f"{path}: {reason}; give an instances_*.json file") from None


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--image-dir", type=Path, required=True, help="folder of the images")
    parser.add_argument("--object-annotations-file", type=Path, required=True, help="COCO's JSON")
    parser.add_argument("--output-file-prefix", type=Path, required=True, help="such as train2017")
    parser.add_argument("--num-shards", type=int, default=32, help="files to spread over")
    args = parser.parse_args(argv)
    count = convert(
        args.image_dir, args.object_annotations_file, args.output_file_prefix, args.num_shards
    )
    print(f"{count} records in {args.num_shards} files {args.output_file_prefix}-*.tfrecord")
    return 0


if __name__ == "__main__":
    entry.run(main)
