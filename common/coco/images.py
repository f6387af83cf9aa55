"""Image files to RGB arrays: the pixels that Pillow gives, JPEG by the faster simplejpeg."""

import io
import struct
from contextlib import suppress
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
# JPEG's markers (ITU T.81, table B.1): a frame's header, one of row after row, the file's end.
FRAMES, SEQUENTIAL, END = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}, {0xC0, 0xC1}, b"\xff\xd9"


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


def open_image(path: str) -> EncodedImage:
    """The image file at `path`. Raises UserError where it is missing or no image."""
    try:
        with open(path, "rb", buffering=0) as file:
            return EncodedImage(file.read(), path)
    except OSError as error:
        raise unreadable(path, error) from error
