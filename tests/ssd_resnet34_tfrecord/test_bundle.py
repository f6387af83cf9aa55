"""TensorFlow checkpoints: the golden one, damage, missing parts."""

import re
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from common.errors import UserError
from ssd_resnet34.tfrecord import bundle
from ssd_resnet34.tfrecord.bundle import Bundle, find_prefix, read_handle
from ssd_resnet34.tfrecord.records import masked_crc

NAME = "model.ckpt-28152"
PARTS = ("index", "data-00000-of-00001")


@pytest.fixture
def copied(golden_dir, tmp_path):
    """A checkpoint to damage: its prefix."""
    for part in PARTS:
        (tmp_path / f"{NAME}.{part}").write_bytes(
            (golden_dir / f"checkpoint/{NAME}.{part}").read_bytes()
        )
    return tmp_path / NAME


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_every_variable_is_tensorflows(golden, golden_dir):
    found, expected = Bundle(golden_dir / "checkpoint" / NAME), golden("checkpoint/expected")
    assert set(found.names) == set(expected)
    for name, entry in expected.items():
        value = found.read(name)
        assert str(value.dtype) == f"torch.{entry['dtype']}"
        assert list(value.shape) == list(found.shape(name)) == entry["tf_shape"]
        if "l2" in entry:
            assert value.flatten()[:4].tolist() == entry["first_values_tf_order"]
            assert_allclose(value.double().norm().item(), entry["l2"], rtol=1e-6)
        else:
            assert value.item() == entry["value"]


def test_a_folder_an_index_file_and_a_prefix_name_the_same(golden_dir):
    folder = golden_dir / "checkpoint"
    for given_path in (folder, folder / NAME, folder / f"{NAME}.index"):
        assert find_prefix(given_path) == str(folder / NAME)


def test_a_path_from_another_machine(copied):
    (copied.parent / "checkpoint").write_text(f'model_checkpoint_path: "/elsewhere/{NAME}"\n')
    assert find_prefix(copied.parent) == str(copied)


def test_a_file_of_another_kind_is_none_of_its_business(tmp_path):
    (tmp_path / "weights.pth").touch()
    assert find_prefix(tmp_path / "weights.pth") is None


def test_a_missing_part_is_named(copied):
    next(copied.parent.glob("*.data*")).unlink()
    with pytest.raises(UserError, match=re.escape(f"there is no {copied}.data-*")):
        find_prefix(copied)


def test_a_path_that_is_nothing_is_refused_with_its_flag(tmp_path):
    missing = tmp_path / "missing.pth"
    line = f"{missing}: neither a file nor a TensorFlow checkpoint (no {missing}.index); "
    with pytest.raises(UserError, match=re.escape(line + "check --resnet_checkpoint")):
        find_prefix(missing)


def test_a_path_that_cannot_be_opened_is_refused_with_its_flag(tmp_path):
    with pytest.raises(UserError, match=r"\(File name too long\); check --resnet_checkpoint$"):
        find_prefix(tmp_path / ("n" * 300))


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no file `checkpoint`"):
        find_prefix(tmp_path)


def test_a_damaged_value_is_named(copied):
    data = copied.with_name(f"{NAME}.{PARTS[1]}")
    found = Bundle(copied)
    flip(data, 100)
    with pytest.raises(UserError, match=r"wrong checksum of \S+, at byte \d+"):
        list(map(found.read, found.names))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match=r"ends inside conv2d/kernel, at byte \d+"):
        found.read("conv2d/kernel")


def test_every_damage_of_the_index_is_refused(copied):
    index = copied.with_name(f"{NAME}.index")
    content = index.read_bytes()
    start, size, _ = read_handle(content[-bundle.FOOTER_SIZE :], 0)
    unread = range(start, start + size + 5)  # the meta index, empty
    for place in range(len(content) - bundle.FOOTER_SIZE, 5):
        if place not in unread:
            flip(index, place)
            with pytest.raises(UserError, match="not a table of variables"):
                Bundle(copied)
            flip(index, place)
    for length in range(0, len(content), 7):
        index.write_bytes(content[:length])
        with pytest.raises(UserError, match="not a table of variables"):
            Bundle(copied)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=20, max_size=20))
def test_a_footer_of_anything_is_refused(golden_dir, tmp_path_factory, places):
    content = (golden_dir / f"checkpoint/{NAME}.index").read_bytes()
    prefix = tmp_path_factory.mktemp("index") / NAME
    footer = places + bytes(20) + bundle.MAGIC
    prefix.with_name(f"{NAME}.index").write_bytes(content[: -bundle.FOOTER_SIZE] + footer)
    with pytest.raises(UserError, match="not a table of variables"):
        Bundle(prefix)


# ---- a checkpoint with a partitioned variable, written as TensorFlow does


def varint(value):
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def field(number, value):
    """A field of a message: a varint, or bytes with their length."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def entry(shape, offset, size, crc, slices=()):
    dimensions = b"".join(field(2, field(1, side)) for side in shape)
    parts = b"".join(field(7, part) for part in slices)
    place = field(4, offset) + field(5, size)
    return field(1, 1) + field(2, dimensions) + place + varint(6 << 3 | 5) + crc + parts


def block(pairs):
    """A block of a table in which keys share nothing, with its trailer."""
    content = bytearray()
    for key, value in pairs:
        content += varint(0) + varint(len(key)) + varint(len(value)) + key + value
    content += struct.pack("<II", 0, 1) + b"\0"
    return bytes(content) + struct.pack("<I", masked_crc(bytes(content)))


def write_table(path, pairs):
    data = block(pairs)
    empty = block([])
    index = block([(b"\xff", varint(0) + varint(len(data) - 5))])
    at = len(data) + len(empty)
    footer = varint(len(data)) + varint(len(empty) - 5) + varint(at) + varint(len(index) - 5)
    footer = footer.ljust(bundle.FOOTER_SIZE - len(bundle.MAGIC), b"\0") + bundle.MAGIC
    path.write_bytes(data + empty + index + footer)


@pytest.fixture
def partitioned(tmp_path):
    """The prefix of a checkpoint of `whole` and of `split`, which lies in two parts."""
    values = torch.arange(12, dtype=torch.float32)
    content = values.numpy().tobytes()
    crc = struct.pack("<I", masked_crc(content[:16]))
    # A part's key is binary: the name in an ordered code, and the extent of the part.
    first = b"\0\x01split\0\x01\x02\x80\xc0"
    second = b"\0\x01split\0\x01\x02\x84\xc0"
    pairs = [
        (b"", field(1, 1)),
        (first, entry((4,), 16, 16, crc)),
        (second, entry((4,), 32, 16, crc)),
        (b"split", entry((8,), 0, 0, b"\0" * 4, slices=(b"\x0a\0", b"\x0a\x01"))),
        (b"whole", entry((4,), 0, 16, crc)),
    ]
    write_table(tmp_path / "model.ckpt-1.index", pairs)
    (tmp_path / "model.ckpt-1.data-00000-of-00001").write_bytes(content)
    return tmp_path / "model.ckpt-1"


def test_a_partitioned_variable_that_is_not_needed_does_no_harm(partitioned):
    found = Bundle(partitioned)
    assert found.names == ("split", "whole")
    assert found.read("whole").tolist() == [0, 1, 2, 3]


def test_a_partitioned_variable_that_is_needed_is_named(partitioned):
    with pytest.raises(UserError) as error:
        Bundle(partitioned).read("split")
    assert str(error.value) == (
        f"{partitioned}: split is partitioned into 2 parts, which is not read here; "
        "save it in one part (tf.train.Saver over variables without a partitioner)"
    )
