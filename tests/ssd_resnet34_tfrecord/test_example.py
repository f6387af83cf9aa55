"""tf.Example payloads: golden content, odd encodings, features that are wrong."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from common.coco.images import decode_image
from common.errors import UserError
from ssd_resnet34.tfrecord.example import annotated_image, decode, encode, values
from ssd_resnet34.tfrecord.records import read_records
from tests.ssd_resnet34_tfrecord.test_records import FILES

KIND_OF = {"bytes_list": bytes, "float_list": float, "int64_list": int}
BOX = {f"image/object/bbox/{side}": (float, [0.25]) for side in ("xmin", "ymin")}
BOX |= {f"image/object/bbox/{side}": (float, [0.5]) for side in ("xmax", "ymax")}
GOOD = {
    "image/encoded": (bytes, [b"jpeg"]),
    "image/source_id": (bytes, [b"139"]),
    **BOX,
    "image/object/class/label": (int, [90]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_feature_is_tensorflows(golden, golden_dir, name):
    for payload, expected in zip(
        read_records(str(golden_dir / name)), golden("expected")["files"][name], strict=True
    ):
        features = decode(payload, "file")
        assert set(features) == {*expected["features"], "image/encoded"}
        for feature, entry in expected["features"].items():
            kind = KIND_OF[entry["kind"]]
            found = list(values(features, feature, kind, "file"))
            if kind is bytes:
                found = [value.decode() for value in found]
            assert found == entry["value"]
        (encoded,) = values(features, "image/encoded", bytes, "file")
        assert len(encoded) == expected["encoded_bytes"]
        assert hashlib.sha256(encoded).hexdigest() == expected["encoded_sha256"]


@pytest.mark.parametrize("name", FILES)
def test_decoded_images_are_the_seeds(golden, golden_dir, name):
    for payload, record in zip(
        read_records(str(golden_dir / name)), golden("expected")["files"][name], strict=True
    ):
        expected = record["decoded"]
        found = annotated_image(payload, "file")
        assert str(found.image_id) == expected["source_id"]
        boxes = np.array(expected["boxes_ymin_xmin_ymax_xmax"], np.float32).reshape(-1, 4)
        assert_array_equal(found.boxes_xyxy, boxes[:, [1, 0, 3, 2]])
        assert found.boxes_xyxy.dtype == np.float32
        assert_array_equal(found.category_ids, expected["classes"])
        image = decode_image(found.encoded, "file")
        assert list(image.shape) == expected["image_shape"]
        # TensorFlow decodes another colour in places; the golden says how far Pillow's pixels are.
        sums, pixels = image.sum(axis=(0, 1), dtype=np.int64), image.shape[0] * image.shape[1]
        allowed = expected["pillow_mean_abs_diff"] * pixels * 3 + pixels * 0.01
        assert np.abs(sums - expected["image_channel_sum"]).sum() <= allowed


def test_the_last_of_two_features_of_a_name_wins():
    twice = encode({"image/height": (int, [1])}) + encode({"image/height": (int, [2])})
    assert list(values(decode(twice, "file"), "image/height", int, "file")) == [2]


def test_packed_and_unpacked_lists_negative_numbers_and_unknown_fields():
    # Features: {"a": Int64List of -1 and 5, each with its own tag}, then an unknown field 15.
    numbers = b"\x08" + b"\xff" * 9 + b"\x01" + b"\x08\x05"
    feature = b"\x1a" + bytes([len(numbers)]) + numbers
    entry = b"\x0a\x01a\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry + b"\x7a\x00"
    payload = b"\x0a" + bytes([len(features)]) + features
    assert list(values(decode(payload, "file"), "a", int, "file")) == [-1, 5]
    assert decode(encode({"a": (int, [-1, 5])}), "file")["a"].int64_list.value == [-1, 5]


def test_a_record_without_boxes_and_one_with_empty_lists():
    bare = {"image/encoded": (bytes, [b"jpeg"])}
    empty = {name: (kind, []) for name, (kind, _) in BOX.items()}
    for features in (bare, bare | empty):
        found = annotated_image(encode(features), "file")
        assert found.boxes_xyxy.shape == (0, 4)
        assert found.category_ids.shape == (0,)
        assert found.image_id == -1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image/encoded": (bytes, [])}, "image/encoded has 0 values"),
        ({"image/encoded": (int, [1])}, "image/encoded is of kind int64_list"),
        ({"image/object/class/label": (float, [1.0])}, "label is of kind float_list"),
        ({"image/object/class/label": (int, [1, 2])}, "unequal numbers"),
        ({"image/object/bbox/ymax": (float, [])}, "unequal numbers"),
        ({"image/object/bbox/xmax": (float, [0.1])}, "not ordered"),
        ({"image/object/bbox/xmax": (float, [200.0])}, "within 0..1"),
        ({"image/object/bbox/xmax": (float, [float("nan")])}, "within 0..1"),
        ({"image/source_id": (bytes, [b"one"])}, "source_id is not one number"),
        ({"image/source_id": (bytes, [b"1_0"])}, "source_id is not one number"),
        ({"image/source_id": (bytes, [b"9" * 19])}, "source_id is not one number"),
        ({"image/source_id": (bytes, [b"1", b"2"])}, "source_id is not one number"),
    ],
)
def test_a_wrong_feature_is_named(change, complaint):
    assert annotated_image(encode(GOOD), "file").image_id == 139
    with pytest.raises(UserError, match=f"shard: record 3: .*{complaint}"):
        annotated_image(encode(GOOD | change), "shard: record 3")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_image(payload):
    with pytest.raises(UserError, match=r"^file: "):
        annotated_image(payload, "file")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8 * len(encode(GOOD)) - 1))
def test_a_flipped_bit_gives_an_image_or_one_line(bit):
    payload = bytearray(encode(GOOD))
    payload[bit // 8] ^= 1 << bit % 8
    message = "file: "
    try:
        annotated_image(bytes(payload), "file")
    except UserError as error:
        message = str(error)
    assert message.startswith("file: ")
    assert "\n" not in message


def test_two_images_of_a_name_and_two_values_of_one():
    first, second = (encode({"image/encoded": (bytes, [image])}) for image in (b"a", b"b"))
    assert annotated_image(first + second, "file").encoded == b"b"
    with pytest.raises(UserError, match="has 2 values"):
        annotated_image(encode({"image/encoded": (bytes, [b"a", b"b"])}), "file")
