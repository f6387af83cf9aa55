"""Image files to RGB arrays: the pixels that Pillow gives, JPEG by the faster simplejpeg."""

import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from common.coco.index import CocoIndex
from common.errors import UserError
from common.files import Extent

if TYPE_CHECKING:
    from common.npu.file_cache import FileCache

# What Pillow raises for a broken file; the last four are of damaged headers. Its
# UnidentifiedImageError is an OSError.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    TypeError,
    AttributeError,
    ArithmeticError,
    LookupError,
)
JPEG_START = b"\xff\xd8"
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
CMYK_SPACES = ("CMYK", "YCCK")  # whose RGB pixels by simplejpeg are not always Pillow's
# Pillow's modes that fit into 8 bits a channel.
MODES_OF_8_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
LARGEST_16_BIT = 2**16 - 1
# Of these formats Pillow gives 16 bits in its mode I, which is one of 32 bits in others.
FORMATS_OF_16_BITS = ("PNG", "PPM")
GIT_LFS_START = b"version https://git-lfs"  # of the text that stands for a file
REMEDY = "re-download it; --check_data lists all such files"

# The EXIF orientations (tag 0x0112) that exchange height and width: quarter turns.
ORIENTATION = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)
TURNS = {  # to the upright position
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_MARK = b"Exif\x00\x00"  # of EXIF data in a JPEG
HEADER_BYTES = 2**16  # of a JPEG, in which its EXIF data begins
PNG_START = b"\x89PNG"
PNG_EXIF_MARKS = (b"eXIf", b"Raw profile type exif")
TIFF_STARTS = (b"II*\x00", b"MM\x00*")
# A box that reaches further over the edge is a sign that the annotated size is that of the other
# position, a smaller distance is the annotator's: a share of the height or the width.
LARGEST_OVERHANG = 0.05


class AnnotatedImage(NamedTuple):
    """An image whose size is the annotated one."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    is_turned: bool  # as its EXIF orientation asks


class ImageReader:
    """Reads the images of an index in the position that their annotations are for.

    Their annotated size tells it. The pixels as they are stored are taken if they have that size,
    those turned by the EXIF orientation if they have. Both fit a square image and one that is
    turned by 180 degrees: `turns_if_both_fit` says what the original's reader does with them.
    """

    def __init__(self, records: CocoIndex, turns_if_both_fit: bool):
        self.records = records
        self.turns_if_both_fit = turns_if_both_fit
        self.cache: FileCache | None = None  # of the files in `extents`, by `--cache ram`
        # In shared memory: the workers of a loader write it, the main process counts.
        self._is_turned = torch.zeros(len(records), dtype=torch.bool).share_memory_()

    def read(self, i: int) -> np.ndarray:
        """Read image `i`, (H, W, 3) uint8 RGB.

        Raise UserError for a file that cannot be read, where neither position has the annotated
        size, and where the boxes show that this size belongs to the other position.
        """
        path = self.records.path(i)
        height, width = self.records.sizes[i].tolist()
        image = in_annotated_position(
            data=_read_bytes(path) if self.cache is None else self.cache.read(i),
            where=path,
            size=(height, width),
            far_corner=tuple(self.records.far_corners[i].tolist()),
            turns_if_both_fit=self.turns_if_both_fit,
        )
        if image.is_turned:
            self._is_turned[i] = True
        return image.pixels

    def extents(self) -> list[Extent]:
        """Return what is read of the file of each image."""
        return [Extent(self.records.path(i)) for i in range(len(self.records))]

    @property
    def is_turned(self) -> np.ndarray:
        """Which images (I,) bool were turned by their EXIF orientation so far."""
        return self._is_turned.numpy().copy()


def turned_images_line(num_turned: int, num_images: int) -> str:
    """Return the sentence on the images that an ImageReader has turned."""
    return (
        f"{num_turned} of {num_images} images were turned by their EXIF orientation, as their "
        "annotated sizes ask"
    )


def read_image(path: str | Path, ignore_exif: bool = True) -> np.ndarray:
    """Read an image file as uint8 (H, W, 3) RGB, C-contiguous and writable.

    The EXIF orientation is applied only with `ignore_exif=False`. Raise UserError for a missing,
    truncated or foreign file.
    """
    data = _read_bytes(path)
    if ignore_exif:
        return decode_image(data, str(path))
    return decode_upright(data, str(path))


def decode_image(data: bytes, where: str, remedy: str = REMEDY) -> np.ndarray:
    """Decode the bytes of an image file to uint8 (H, W, 3) RGB, C-contiguous and writable.

    Of 16 bits the upper 8 are kept, as OpenCV does; an image that uses only 12 of them becomes dark
    there too. Raise UserError for bytes that are no complete image, and for pixels that 8 bits do
    not hold; `where` (the file) and `remedy` (what the user can do) are named in its message.
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


def decode_upright(data: bytes, where: str, remedy: str = REMEDY) -> np.ndarray:
    """Do what `decode_image` does, and turn the pixels as the EXIF orientation asks."""
    stored = decode_image(data, where, remedy)
    turn = TURNS.get(exif_orientation(data))
    if turn is None:
        return stored
    return np.array(Image.fromarray(stored).transpose(turn))


def stored_size(data: bytes, where: str, remedy: str = REMEDY) -> tuple[int, int]:
    """Return the (height, width) of the bytes of an image as it is stored, from its header alone.

    Raise UserError for bytes that are no image; `where` (the file) and `remedy` are in its message.
    """
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except BROKEN as error:
        raise unreadable(where, error, remedy) from error
    return height, width


def to_array(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """Return an image as uint8 (H, W, 3) RGB.

    A file is read upright, as its EXIF orientation asks; a PIL image and an array are taken as they
    are. Raise UserError for a file that is no image and an array of another shape or type.
    """
    if isinstance(image, str | Path):
        return read_image(image, ignore_exif=False)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the image")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(
            f"array of shape {array.shape} and type {array.dtype}: give (H, W, 3) uint8 RGB"
        )
    if not array.flags.writeable:
        return array.copy()  # torch would warn
    return array


def unreadable(where: str | Path, error: Exception, remedy: str = REMEDY) -> UserError:
    """Return the error for an image that cannot be read: the file, the reason, the remedy."""
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image in a format that Pillow knows"
    else:
        reason = getattr(error, "strerror", None) or str(error) or "truncated"
    return UserError(f"{where}: cannot read the image ({reason})", remedy)


def in_annotated_position(
    data: bytes,
    where: str,
    size: tuple[int, int],
    far_corner: tuple[float, float],
    turns_if_both_fit: bool,
) -> AnnotatedImage:
    """Do what ImageReader does with the bytes of a file.

    `size` is the annotated (height, width), `far_corner` the largest y and x of any box.
    """
    stored = decode_image(data, where)
    is_turned = is_annotated_turned(
        data, where, stored.shape[:2], size, far_corner, turns_if_both_fit
    )
    if is_turned:
        return AnnotatedImage(decode_upright(data, where), is_turned=True)
    return AnnotatedImage(stored, is_turned=False)


def is_annotated_turned(
    data: bytes,
    where: str,
    stored: tuple[int, int],
    size: tuple[int, int],
    far_corner: tuple[float, float],
    turns_if_both_fit: bool,
) -> bool:
    """Return whether the annotations are for the image as its EXIF orientation turns it.

    This is the rule of ImageReader; the pixels are not decoded for it. `stored` is the (height,
    width) of the pixels of `data`, `size` and `far_corner` are as in `in_annotated_position`. Raise
    UserError where neither position fits.
    """
    stored_fits = stored == size
    boxes_fit = _holds(size, far_corner)
    if stored_fits and not turns_if_both_fit and boxes_fit:
        return False

    orientation = exif_orientation(data)
    turned = stored
    if orientation in QUARTER_TURNS:
        turned = (stored[1], stored[0])
    turned_fits = turned == size
    if not (stored_fits or turned_fits):
        raise _wrong_size(where, stored, size)
    other_position = turned if stored_fits else stored
    if other_position != size and not boxes_fit and _holds(other_position, far_corner):
        raise _boxes_of_other_position(where, size, other_position, stored_fits)
    return turned_fits and orientation != 1 and (turns_if_both_fit or not stored_fits)


def _holds(size: tuple[int, int], far_corner: tuple[float, float]) -> bool:
    """Return whether an image of (height, width) holds boxes whose far corner is at (y, x)."""
    height, width = size
    bottom, right = far_corner
    limit = 1 + LARGEST_OVERHANG
    return bottom <= limit * height and right <= limit * width


def exif_orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file's bytes, from 1 (as stored) to 8."""
    # Few photographs of a data set have EXIF data, and to look for its mark is many times faster.
    if data[:2] == JPEG_START and EXIF_MARK not in data[:HEADER_BYTES]:
        return 1
    # Of a PNG without it Pillow would decode all pixels; a TIFF it turns by itself.
    if data[:4] == PNG_START and not any(mark in data for mark in PNG_EXIF_MARKS):
        return 1
    if data[:4] in TIFF_STARTS:
        return 1
    try:
        orientation = Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1)
    except BROKEN:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _wrong_size(where: str, stored: tuple[int, int], annotated: tuple[int, int]) -> UserError:
    return UserError(
        f"{where}: is {_text(stored)} pixels, {_text(annotated)} in the annotation file",
        "correct the annotations or put the image back that they were made for; --check_data lists "
        "all such files",
    )


def _boxes_of_other_position(
    where: str, annotated: tuple[int, int], other: tuple[int, int], is_stored: bool
) -> UserError:
    """Return the error for boxes that fit only the `other` position than the annotated size.

    `is_stored` says that this size is the one of the pixels as they are stored.
    """
    if is_stored:
        explanation = (
            "the boxes are for the upright picture, the annotated size is that of the stored "
            "pixels, as Label Studio, for one, writes it"
        )
    else:
        explanation = (
            "the boxes are for the stored pixels, the annotated size is that of the upright picture"
        )
    return UserError(
        f"{where}: its boxes reach over the annotated {_text(annotated)} pixels but fit into "
        f"{_text(other)}, as its EXIF orientation exchanges them: {explanation}",
        "exchange width and height in the annotation file for every image with such an "
        "orientation, also for those whose boxes happen to fit",
    )


def _text(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width} x {height}"


def _read_bytes(path: str | Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise unreadable(path, error) from error


def _decode_by_pillow(data: bytes, where: str, remedy: str) -> np.ndarray:
    try:
        return _to_rgb(Image.open(io.BytesIO(data)), where)
    except BROKEN as error:
        if not data:
            raise UserError(f"{where}: the image file is empty", remedy) from error
        if bytes(data[: len(GIT_LFS_START)]) == GIT_LFS_START:
            raise UserError(
                f"{where}: not the image, but Git LFS's pointer to it", "git lfs pull fetches it"
            ) from error
        if bytes(data[4:12]) in HEIC_BRANDS:
            remedy = "Pillow reads HEIC only with a plug-in: convert it to JPEG"
        elif isinstance(error, Image.DecompressionBombError):
            remedy = "make it smaller, and its annotations with it"
        raise unreadable(where, error, remedy) from error


def _to_rgb(image: Image.Image, where: str) -> np.ndarray:
    """Return a PIL image (H, W, 3) uint8 RGB. Raise UserError where 8 bits lose its range."""
    if image.mode in MODES_OF_8_BITS:
        return np.array(image.convert("RGB"))
    if image.mode.startswith("I"):
        values = np.array(image)
        is_16_bit = image.mode != "I" or image.format in FORMATS_OF_16_BITS
        if is_16_bit and values.min() >= 0 and values.max() <= LARGEST_16_BIT:
            upper_bits = (values >> 8).astype(np.uint8)
            return np.repeat(upper_bits[:, :, np.newaxis], 3, axis=2)
    raise UserError(
        f"{where}: has pixels of Pillow's mode {image.mode}, which 8 bits a channel do not hold",
        "convert it to 8 bits",
    )
