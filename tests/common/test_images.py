import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.coco.images import decode_image, read_image, to_array
from common.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_coco"
JPEGS = sorted(TINY.glob("*2017/*.jpg"))


def save(path, image, **options):
    image.save(path, **options)
    return str(path)


def test_pixels_equal_pillows():
    assert len(JPEGS) == 100
    for path in JPEGS[::5]:
        image = read_image(str(path))
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.flags.writeable
        np.testing.assert_array_equal(image, np.array(Image.open(path).convert("RGB")))


def jpeg(width: int, height: int, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.open(JPEGS[3]).resize((width, height)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


JPEG_OPTIONS = {
    "subsampling": st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    "progressive": st.booleans(),
    "optimize": st.booleans(),
    "restart_marker_blocks": st.integers(0, 5),
}


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    options=st.fixed_dictionaries(JPEG_OPTIONS),
)
def test_every_kind_of_jpeg_has_pillows_pixels(width, height, mode, options):
    encoded = jpeg(width, height, mode, **options)
    image = decode_image(encoded, "file")
    np.testing.assert_array_equal(image, np.array(Image.open(io.BytesIO(encoded)).convert("RGB")))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    np.testing.assert_array_equal(decode_image(memoryview(encoded), "file"), image)


@pytest.mark.parametrize("sampling", ["440", "411"])
def test_rare_samplings_have_pillows_pixels(sampling):
    encoded = simplejpeg.encode_jpeg(read_image(str(JPEGS[5])), colorsubsampling=sampling)
    expected = np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(encoded, "file"), expected)


def test_bytes_that_are_no_image_name_file_and_remedy():
    data = JPEGS[0].read_bytes()
    with pytest.raises(UserError, match=r"file: cannot read the image \(.*truncated.*\); again"):
        decode_image(data[: len(data) * 9 // 10], "file", "again")
    with pytest.raises(UserError, match=r"file: .*re-download"):
        decode_image(b"", "file")


def test_arrays_of_whatever_a_user_has(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = save(tmp_path / "turned.jpg", Image.open(JPEGS[0]).resize((40, 24)), exif=exif)
    upright = read_image(path, ignore_exif=False)
    np.testing.assert_array_equal(to_array(path), upright)
    np.testing.assert_array_equal(to_array(Path(path)), upright)
    np.testing.assert_array_equal(to_array(upright), upright)
    grey = Image.fromarray(upright).convert("L")
    np.testing.assert_array_equal(to_array(grey), np.array(grey.convert("RGB")))
    for wrong in (upright[:, :, 0], upright.astype(np.float32), upright[None]):
        with pytest.raises(UserError, match=r"give \(H, W, 3\) uint8 RGB"):
            to_array(wrong)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode in ("L", "CMYK") else "png"
    path = save(tmp_path / f"a.{suffix}", Image.open(JPEGS[0]).resize((33, 21)).convert(mode))
    np.testing.assert_array_equal(read_image(path), np.array(Image.open(path).convert("RGB")))


def test_exif_orientation_only_on_request(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = save(tmp_path / "turned.jpg", Image.open(JPEGS[0]).resize((40, 24)), exif=exif)
    assert read_image(path).shape == (24, 40, 3)
    upright = read_image(path, ignore_exif=False)
    np.testing.assert_array_equal(upright, np.rot90(read_image(path), -1))


def test_trailing_bytes_are_harmless(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEGS[0].read_bytes() + b"camera notes")
    np.testing.assert_array_equal(read_image(str(path)), read_image(str(JPEGS[0])))


def png() -> bytes:
    file = io.BytesIO()
    Image.open(JPEGS[0]).resize((64, 64)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", JPEGS[0].read_bytes()[:9000], JPEGS[0].read_bytes()[:3], png()[:2000]],
    ids=["empty", "text", "half a JPEG", "start of a JPEG", "half a PNG"],
)
def test_broken_files_name_path_and_remedy(tmp_path, data):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.jpg: .*re-download.*--check_data"):
        read_image(str(path))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_image(str(tmp_path / "none.jpg"))
    with pytest.raises(UserError, match="directory"):
        read_image(str(tmp_path))


@pytest.mark.parametrize("data", [png(), JPEGS[0].read_bytes()], ids=["png", "jpeg"])
def test_damaged_bytes_never_raise_anything_else(tmp_path, data):
    rng = np.random.default_rng(0)
    path = tmp_path / "a"
    refused = 0
    for _ in range(100):
        damaged = np.frombuffer(data, dtype=np.uint8).copy()
        damaged[rng.integers(2, min(len(data), 4000), 6)] = rng.integers(0, 256, 6)
        path.write_bytes(damaged.tobytes())
        try:
            assert read_image(str(path)).shape[2] == 3
        except UserError:
            refused += 1
    assert refused > 0
