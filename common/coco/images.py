"""Image files to RGB arrays: the pixels that Pillow gives, JPEG by the faster simplejpeg."""

import io
import struct
from contextlib import suppress

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from common.errors import UserError

# What Pillow raises for a broken file, beside UnidentifiedImageError (an OSError).
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
REMEDY = "re-download it; --check_data lists all such files"
# JPEG's markers (ITU T.81, table B.1): a frame's header, one of row after row, the file's end.
FRAMES, SEQUENTIAL, END = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}, {0xC0, 0xC1}, b"\xff\xd9"


class EncodedImage:
    """An image file's bytes, decoded no further down than asked for.

    `image[top:bottom, left:right]` as of an array of `shape` (H, W, 3), uint8 RGB; a JPEG's rows
    below `bottom` cost nothing, unless it is progressive. `where`, `remedy`: of the UserError.
    """

    def __init__(self, data: bytes | memoryview, where: str, remedy: str = REMEDY):
        self.data, self.where, self.remedy = data, where, remedy
        self.frame = _jpeg_frame(data)
        if self.frame:
            self.shape = *struct.unpack_from(">HH", data, self.frame + 5), 3
        else:
            self.pixels = self.by_pillow()
            self.shape = self.pixels.shape

    def __getitem__(self, window: slice | tuple[slice, slice]) -> np.ndarray:
        rows, columns = window if isinstance(window, tuple) else (window, slice(None))
        top, bottom, _ = rows.indices(self.shape[0])
        pixels = self._upper(bottom) if self.frame else self.pixels
        return pixels[top:bottom, columns]

    def _upper(self, bottom: int) -> np.ndarray:
        """A JPEG's rows down to `bottom` at least, by a smaller height in its header."""
        data, rows = self.data, bottom + 2  # a row's colour is blended with the next one's
        cut = rows < self.shape[0] and data[self.frame + 1] in SEQUENTIAL
        if cut:
            data = bytearray(data)
            cut = data.rfind(END, self.frame) > 0  # else truncated: libjpeg is to see that
        if cut:
            struct.pack_into(">H", data, self.frame + 5, rows)
        with suppress(ValueError):  # also raised for a mere warning: Pillow decides
            # To libjpeg what follows the last row is one.
            return simplejpeg.decode_jpeg(data, "RGB", strict=not cut)
        return self.by_pillow()

    def by_pillow(self, turn=lambda image: image) -> np.ndarray:
        try:
            return np.array(turn(Image.open(io.BytesIO(self.data))).convert("RGB"))
        except BROKEN as error:
            raise unreadable(self.where, error, self.remedy) from error


def _jpeg_frame(data: bytes | memoryview) -> int | None:
    """Where the frame header of a JPEG that simplejpeg makes RGB begins; None for other files."""
    place = 2 if data[:2] == b"\xff\xd8" else len(data)
    while place + 10 < len(data) and data[place] == 0xFF:
        if data[place + 1] in FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, place + 4)
            return place if bits == 8 and height and width and channels in (1, 3) else None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def unreadable(where: str, error: Exception, remedy: str = REMEDY) -> UserError:
    reason = getattr(error, "strerror", None) or "truncated, or not an image"
    return UserError(f"{where}: cannot read the image ({reason}); {remedy}")


def open_image(path: str) -> EncodedImage:
    """The image file at `path`. Raises UserError where it is missing or no image."""
    try:
        with open(path, "rb", buffering=0) as file:
            return EncodedImage(file.read(), path)
    except OSError as error:
        raise unreadable(path, error) from error


def read_image(path: str, ignore_exif: bool = True) -> np.ndarray:
    """Decode the image file at `path` to uint8 (H, W, 3) RGB, C-contiguous and writable.

    The EXIF orientation is applied only with `ignore_exif=False`; COCO's boxes refer to the pixels
    as stored. Raises UserError for a missing, truncated or foreign file.
    """
    image = open_image(path)
    return image[:] if ignore_exif else image.by_pillow(ImageOps.exif_transpose)
