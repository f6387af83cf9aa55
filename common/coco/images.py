"""Image files to RGB arrays: the pixels that Pillow gives, JPEG by the faster simplejpeg."""

import io
import struct
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from common.errors import UserError

# What Pillow raises for a broken file. Its UnidentifiedImageError is an OSError.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
JPEG_START = b"\xff\xd8"
CMYK_SPACES = ("CMYK", "YCCK")  # whose RGB pixels by simplejpeg are not always Pillow's
REMEDY = "re-download it; --check_data lists all such files"


def read_image(path: str | Path, ignore_exif: bool = True) -> np.ndarray:
    """Read an image file as uint8 (H, W, 3) RGB, C-contiguous and writable.

    The EXIF orientation is applied only with `ignore_exif=False`: COCO's boxes refer to the pixels
    as they are stored. Raise UserError for a missing, truncated or foreign file.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise unreadable(path, error) from error
    if ignore_exif:
        return decode_image(data, str(path))
    return _decode_by_pillow(data, str(path), REMEDY, upright=True)


def decode_image(data: bytes, where: str, remedy: str = REMEDY) -> np.ndarray:
    """Decode the bytes of an image file to uint8 (H, W, 3) RGB, C-contiguous and writable.

    Raise UserError for bytes that are no complete image; `where` (the file) and `remedy` (what the
    user can do) are named in its message.
    """
    if bytes(data[:2]) == JPEG_START:
        try:
            colour_space = simplejpeg.decode_jpeg_header(data)[2]
            if colour_space not in CMYK_SPACES:
                return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except ValueError:
            # Raised for broken files, but also for mere warnings of libjpeg: Pillow decides.
            pass
    return _decode_by_pillow(data, where, remedy)


def to_array(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """Return an image as uint8 (H, W, 3) RGB.

    A file is read upright, as its EXIF orientation asks; a PIL image and an array are taken as they
    are. Raise UserError for a file that is no image and an array of another shape or type.
    """
    if isinstance(image, str | Path):
        return read_image(image, ignore_exif=False)
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(
            f"array of shape {array.shape} and type {array.dtype}: give (H, W, 3) uint8 RGB"
        )
    return array


def _decode_by_pillow(data: bytes, where: str, remedy: str, upright: bool = False) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data))
        if upright:
            image = ImageOps.exif_transpose(image)
        return np.array(image.convert("RGB"))
    except BROKEN as error:
        raise unreadable(where, error, remedy) from error


def unreadable(where: str | Path, error: Exception, remedy: str = REMEDY) -> UserError:
    """Return the error for an image that cannot be read: the file, the reason, the remedy."""
    reason = getattr(error, "strerror", None) or "truncated, or not an image"
    return UserError(f"{where}: cannot read the image ({reason}); {remedy}")
