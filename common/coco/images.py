"""Image files to RGB arrays: the pixels that Pillow gives, JPEG by the faster simplejpeg."""

import io
import struct

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from common.npu.errors import UserError

# What Pillow raises for a broken file, beside UnidentifiedImageError (an OSError).
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: str, ignore_exif: bool = True) -> np.ndarray:
    """Decode the image file at `path` to uint8 (H, W, 3) RGB, C-contiguous and writable.

    The EXIF orientation is applied only with `ignore_exif=False`; COCO's boxes refer to the pixels
    as stored. Raises UserError for a missing, truncated or foreign file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        return _decode(data, ignore_exif)
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or "truncated, or not an image"
        raise UserError(
            f"{path}: cannot read the image ({reason}); delete or re-download it; "
            "--check_data lists every such file"
        ) from error


def _decode(data: bytes, ignore_exif: bool) -> np.ndarray:
    if ignore_exif and data.startswith(b"\xff\xd8"):
        try:
            colorspace = simplejpeg.decode_jpeg_header(data)[2]
            if colorspace not in ("CMYK", "YCCK"):  # Pillow converts these two differently
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # also raised for a mere warning: Pillow decides
    with Image.open(io.BytesIO(data)) as image:
        upright = image if ignore_exif else ImageOps.exif_transpose(image)
        return np.array(upright.convert("RGB"))
