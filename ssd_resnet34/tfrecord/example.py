"""The payload of a record: a `tf.Example`, and the features of an annotated image in it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from common.errors import UserError
from ssd_resnet34.tfrecord.messages import message_classes, varint

_MESSAGES = message_classes("""
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
""")
Example, Features = _MESSAGES["Example"], _MESSAGES["Features"]

KINDS = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
SIDES = ("xmin", "ymin", "xmax", "ymax")
# How a protocol buffer begins fields 1 and 2, and the entry of a record's image in a map.
FIELD_1, FIELD_2 = 0x0A, 0x12
IMAGE_KEY = b"\x0a\x0dimage/encoded"
REMEDY = "convert the data set again with coco_to_tfrecord.py"


class AnnotatedImage(NamedTuple):
    """What the recipe uses of a record."""

    encoded: bytes | memoryview  # the JPEG or PNG file
    image_id: int  # -1 where there is none
    boxes_ltrb: np.ndarray  # (n, 4) float32 normalised
    category_ids: np.ndarray  # (n,) int64, COCO's own


def encode(features: Mapping[str, tuple[type, Sequence]]) -> bytes:
    """A serialised `tf.Example` of `{name: (bytes, float or int, values)}`; same in, same out."""
    example = Example()
    for name, (kind, values) in features.items():
        values_of = getattr(example.features.feature[name], KINDS[kind])
        values_of.SetInParent()
        values_of.value.extend(values)
    return example.SerializeToString(deterministic=True)


def decode(payload: bytes, where: str) -> Mapping:
    """The features by name; `where` (file and place) begins the UserError for a broken one."""
    try:
        return Example.FromString(payload).features.feature
    except DecodeError:
        raise UserError(f"{where}: not a tf.Example; {REMEDY}") from None


def values(features: Mapping, name: str, kind: type, where: str) -> Sequence:
    """The list of a feature, empty where absent. Raises UserError for one of another kind."""
    if name not in features:
        return ()
    feature = features[name]
    found = feature.WhichOneof("kind")
    if found not in (None, KINDS[kind]):
        raise UserError(f"{where}: {name} is of kind {found}, not {KINDS[kind]}; {REMEDY}")
    return getattr(feature, KINDS[kind]).value


def annotated_image(payload: bytes, where: str) -> AnnotatedImage:
    """Image, id and boxes of a record; without box features there are none.

    Raises UserError for a record without image, with lists of unequal length, an id that is no
    number, or a box that is not finite, ordered and inside the image.
    """
    apart = image_apart(payload, 0, len(payload))
    if apart and apart[1]:
        features, image = apart[0], memoryview(payload)[apart[1]]
    else:
        features = decode(payload, where)
        encoded = values(features, "image/encoded", bytes, where)
        if len(encoded) != 1:
            raise UserError(f"{where}: image/encoded has {len(encoded)} values, not 1; {REMEDY}")
        image = encoded[0]
    sides = [values(features, f"image/object/bbox/{side}", float, where) for side in SIDES]
    categories = values(features, "image/object/class/label", int, where)
    counts = [len(column) for column in (*sides, categories)]
    if len(set(counts)) > 1:
        names = ", ".join((*SIDES, "label"))
        raise UserError(f"{where}: unequal numbers of {names}: {counts}; {REMEDY}")
    boxes = np.array([list(column) for column in sides], np.float32).reshape(4, -1).T
    # A hundredth over the edge is rounding; NaN fails every comparison.
    inside = ((boxes >= -0.01) & (boxes <= 1.01)).all()
    if not (inside and (boxes[:, :2] <= boxes[:, 2:]).all()):
        raise UserError(f"{where}: a box that is not ordered and within 0..1; {REMEDY}")
    return AnnotatedImage(image, image_id(features, where), boxes, np.array(categories, np.int64))


def image_apart(
    content: Sequence[int], start: int, end: int
) -> tuple[Mapping, slice | None] | None:
    """The features of the tf.Example at a place but its image, and where that lies: an image is
    most of a record, and need not be copied. None where it is laid out unlike TensorFlow's.

    The image's place is None where the record has none.
    """
    kept, image = [], None
    try:
        at, inner = _inside(content, start, FIELD_1)
        if inner != end:
            return None
        while at < end:
            inside, after = _inside(content, at, FIELD_1)
            if content[inside : inside + len(IMAGE_KEY)] == IMAGE_KEY:
                inside += len(IMAGE_KEY)
                for field in (FIELD_2, FIELD_1, FIELD_1):  # value, bytes_list, its only value
                    inside, last = _inside(content, inside, field)
                    if last != after:
                        return None
                image = slice(inside, after)
            else:
                kept.append(content[at:after])
            at = after
        features = Features.FromString(b"".join(kept)).feature
    except (ValueError, IndexError, DecodeError):
        return None
    return (features, image) if at == end else None


def _inside(content: Sequence[int], at: int, field: int) -> tuple[int, int]:
    """Start and end of the content of the field at a place. Raises ValueError for another one."""
    if content[at] != field:
        raise ValueError("another field")
    size, inside = varint(content, at + 1)
    return inside, inside + size


def image_id(features: Mapping, where: str) -> int:
    """COCO's id of the image, -1 where the record has none. Raises UserError for no number."""
    text = values(features, "image/source_id", bytes, where)
    if not len(text):
        return -1
    if len(text) == 1 and text[0].isdigit() and len(text[0]) < 19:
        return int(text[0])
    raise UserError(f"{where}: image/source_id is not one number; {REMEDY}")
