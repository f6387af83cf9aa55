import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.coco.images import read_image
from common.npu.errors import UserError

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
