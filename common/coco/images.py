"""Image files to RGB arrays: the pixels that Pillow gives, JPEG by the faster simplejpeg."""

import io
import struct
from contextlib import suppress

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
        if ignore_exif and data.startswith(b"\xff\xd8"):
            with suppress(ValueError):  # also raised for a mere warning: Pillow decides
                if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
                    return simplejpeg.decode_jpeg(data, "RGB")
        image = Image.open(io.BytesIO(data))
        return np.array((image if ignore_exif else ImageOps.exif_transpose(image)).convert("RGB"))
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or "truncated, or not an image"
        remedy = "re-download it; --check_data lists all such files"
        raise UserError(f"{path}: cannot read the image ({reason}); {remedy}") from error
