"""The payload of a record: a `tf.Example`, and the features of an annotated image in it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from common.coco.images import decode_image
from common.errors import UserError
from ssd_resnet34.tfrecord.messages import message_classes

Example = message_classes("""
    name: "example"
    message_type { name: "BytesList"
        field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
    message_type { name: "FloatList"
        field { name: "value" number: 1 type: TYPE_FLOAT label: LABEL_REPEATED } }
    message_type { name: "Int64List"
        field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
    message_type { name: "Feature" oneof_decl { name: "kind" }
        field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: ".BytesList"
            label: LABEL_OPTIONAL oneof_index: 0 }
        field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".FloatList"
            label: LABEL_OPTIONAL oneof_index: 0 }
        field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: ".Int64List"
            label: LABEL_OPTIONAL oneof_index: 0 } }
    message_type { name: "Features"
        field { name: "feature" number: 1 type: TYPE_MESSAGE type_name: ".Features.FeatureEntry"
            label: LABEL_REPEATED }
        nested_type { name: "FeatureEntry" options { map_entry: true }
            field { name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
            field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".Feature"
                label: LABEL_OPTIONAL } } }
    message_type { name: "Example"
        field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".Features"
            label: LABEL_OPTIONAL } }
""")["Example"]

# The list of a feature that holds values of a Python type.
LIST_OF_TYPE = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
CATEGORY = "image/object/class/label"
CATEGORY_NAME = "image/object/class/text"
SIDES = ("xmin", "ymin", "xmax", "ymax")
TOLERANCE = 0.01  # by how much a normalised box may exceed the image: converters round
MAX_ID_DIGITS = 18  # of a number that fits 64 bits for certain
REMEDY = "convert the data set again with coco_to_tfrecord.py"


class AnnotatedImage(NamedTuple):
    """What the recipe uses of a record."""

    encoded: bytes  # the JPEG or PNG file
    size: tuple[int, int] | None  # height, width as the record says; None where it does not
    image_id: int  # -1 where the record has none
    boxes_xyxy: np.ndarray  # (n, 4) float32 normalised
    category_ids: np.ndarray  # (n,) int64


def encode(features: Mapping[str, tuple[type, Sequence]]) -> bytes:
    """Return a serialised `tf.Example` of `{name: (bytes, float or int, values)}`.

    The same features always give the same bytes.
    """
    example = Example()
    for name, (value_type, feature_values) in features.items():
        value_list = getattr(example.features.feature[name], LIST_OF_TYPE[value_type])
        value_list.SetInParent()  # an empty list is there as well
        value_list.value.extend(feature_values)
    return example.SerializeToString(deterministic=True)


def decode(payload: bytes, where: str) -> Mapping:
    """Return the features of a record by name.

    Raise UserError for a payload that is no `tf.Example`; `where`, the file and the position of
    the record, begins its message.
    """
    try:
        return Example.FromString(payload).features.feature
    except DecodeError:
        raise UserError(f"{where}: not a tf.Example; {REMEDY}") from None


def values(features: Mapping, name: str, value_type: type, where: str) -> Sequence:
    """Return the list of a feature, empty where it is absent.

    Raise UserError where it holds values of another type than bytes, float or int, as asked.
    """
    if name not in features:
        return ()
    feature = features[name]
    present_list = feature.WhichOneof("kind")
    expected_list = LIST_OF_TYPE[value_type]
    if present_list not in (None, expected_list):
        raise UserError(f"{where}: {name} is of kind {present_list}, not {expected_list}; {REMEDY}")
    return getattr(feature, expected_list).value


def annotated_image(payload: bytes, where: str) -> AnnotatedImage:
    """Return the image of a record with its id and boxes, none where there are no box features.

    Raise UserError for a record without an image, with lists of unequal lengths, with an id that
    is no number, or with a box that is not finite, ordered and inside the image.
    """
    features = decode(payload, where)
    encoded = values(features, "image/encoded", bytes, where)
    if len(encoded) != 1:
        raise UserError(f"{where}: image/encoded has {len(encoded)} values, not 1; {REMEDY}")
    coordinates = []
    for side in SIDES:
        coordinates.append(values(features, f"image/object/bbox/{side}", float, where))
    category_ids = values(features, CATEGORY, int, where)
    lengths = [len(column) for column in (*coordinates, category_ids)]
    if len(set(lengths)) > 1:
        names = ", ".join((*SIDES, "label"))
        raise UserError(f"{where}: unequal numbers of {names}: {lengths}; {REMEDY}")
    boxes_xyxy = np.array([list(column) for column in coordinates], np.float32)
    boxes_xyxy = boxes_xyxy.reshape(4, -1).T
    # NaN fails every comparison.
    inside = (boxes_xyxy >= -TOLERANCE) & (boxes_xyxy <= 1 + TOLERANCE)
    ordered = boxes_xyxy[:, :2] <= boxes_xyxy[:, 2:]
    if not (inside.all() and ordered.all()):
        raise UserError(f"{where}: a box that is not ordered and within 0..1; {REMEDY}")
    return AnnotatedImage(
        encoded=encoded[0],
        size=image_size(features, where),
        image_id=image_id(features, where),
        boxes_xyxy=boxes_xyxy,
        category_ids=np.array(category_ids, np.int64),
    )


def image_size(features: Mapping, where: str) -> tuple[int, int] | None:
    """Return the (height, width) that a record says its image has, None where it does not say it.

    Raise UserError where they are not integers.
    """
    heights = values(features, "image/height", int, where)
    widths = values(features, "image/width", int, where)
    if len(heights) != 1 or len(widths) != 1:
        return None
    return heights[0], widths[0]


def decode_pixels(image: AnnotatedImage, where: str) -> np.ndarray:
    """Return the pixels of a record's image, (H, W, 3) uint8 RGB, as they are stored.

    Raise UserError for an image that cannot be decoded, and for one of another size than the
    record says: its boxes are then for another image, or for the image as EXIF turns it.
    """
    pixels = decode_image(image.encoded, where, REMEDY)
    height, width = pixels.shape[:2]
    if image.size is not None and image.size != (height, width):
        record_height, record_width = image.size
        raise UserError(
            f"{where}: its image is {width} x {height} pixels, {record_width} x {record_height} "
            "in image/width and image/height",
            REMEDY,
        )
    return pixels


def image_id(features: Mapping, where: str) -> int:
    """Return the id of the image in COCO's annotations, -1 where the record has none.

    Raise UserError where it is not one number.
    """
    texts = values(features, "image/source_id", bytes, where)
    if not texts:
        return -1
    if len(texts) == 1 and texts[0].isdigit() and len(texts[0]) <= MAX_ID_DIGITS:
        return int(texts[0])
    raise UserError(f"{where}: image/source_id is not one number; {REMEDY}")
