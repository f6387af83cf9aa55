"""Position, image id and number of boxes of every record of a set of files, read at the start.

With it an epoch can be shuffled as a whole, shared evenly by any number of ranks whatever the
number of files, and resumed at any record. Checksums of contents are verified when a record is
used.

At every start each rank reads the files once from beginning to end, the images included: 18 GB for
COCO's training set, of which the ranks of a host share what the page cache holds. TFRecord files
have no table of contents, and the id and the boxes stand in the same message as the image, in no
fixed order. To skip the images, the message would have to be parsed here instead of by protobuf.
"""

import zlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.arithmetic import round_up
from common.coco.index import BOXES_MULTIPLE, COCO_CLASSES
from common.errors import UserError
from common.files import Extent
from ssd_resnet34.tfrecord.config import COCO_CATEGORY_IDS
from ssd_resnet34.tfrecord.example import (
    CATEGORY,
    CATEGORY_NAME,
    AnnotatedImage,
    annotated_image,
    decode,
    decode_pixels,
    image_id,
    image_size,
    values,
)
from ssd_resnet34.tfrecord.records import (
    FOOTER,
    HEADER,
    Span,
    describe,
    match_files,
    payload_of,
    read_record,
    scan_records,
)

if TYPE_CHECKING:
    from common.npu.file_cache import FileCache

CATEGORY_REMEDY = "give the ids of all categories in --category_ids"


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """R records in the order of the sorted files.

    Flat arrays only: a forked worker reads them without touching a reference count, so the memory
    stays shared.
    """

    files: np.ndarray  # (F,) str
    file_of_record: np.ndarray  # (R,) int32 index in files
    spans: np.ndarray  # (R, 2) int64 offset of the header, length of the payload
    image_ids: np.ndarray  # (R,) int64; -1 where the record has none
    # (R, 2) int64 height and width that the annotation file has for the image, if there is one,
    # else those that the record says, 0 where it does not
    sizes: np.ndarray
    num_boxes: np.ndarray  # (R,) int64
    # The different pairs of a category id and its name that the boxes of the files have, sorted.
    # The name is empty where a record has none.
    categories: tuple[tuple[int, str], ...]
    category_ids: tuple[int, ...]  # of each class
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.file_of_record)

    def read(self, record: int) -> AnnotatedImage:
        """Read a record and verify its checksum. Raise UserError for a damaged one."""
        span = Span(*self.spans[record])
        payload = read_record(self.path(record), span)
        return annotated_image(payload, self.where(record))

    def pixels(self, image: AnnotatedImage, record: int) -> np.ndarray:
        """Decode the image of a record, (H, W, 3) uint8 RGB.

        Raise UserError as `decode_pixels` does, and where its size is not that of `sizes`.
        """
        pixels = decode_pixels(image, self.where(record))
        height, width = self.sizes[record].tolist()
        if height > 0 and pixels.shape[:2] != (height, width):
            raise wrong_size(self.where(record), pixels.shape[:2], (height, width))
        return pixels

    def image_by_id(self, image_id: int) -> np.ndarray | None:
        """Return the image (H, W, 3) uint8 RGB of an id, None where no record has it."""
        records = np.flatnonzero(self.image_ids == image_id)
        if len(records) == 0:
            return None
        record = int(records[0])
        return self.pixels(self.read(record), record)

    def path(self, record: int) -> str:
        return str(self.files[self.file_of_record[record]])

    def where(self, record: int) -> str:
        """Return the file and the position of a record, as error messages begin."""
        offset = self.spans[record, 0]
        return describe(self.path(record), offset)

    def labels(self, image: AnnotatedImage, record: int) -> np.ndarray:
        """Return the 0-based classes (n,) int64 of a record's boxes.

        Raise UserError for a category that the recipe does not know.
        """
        labels = []
        for category_id in image.category_ids.tolist():
            if category_id not in self.category_ids:
                raise UserError(
                    f"{self.where(record)}: category {category_id} is none of the recipe's",
                    CATEGORY_REMEDY,
                )
            labels.append(self.category_ids.index(category_id))
        return np.array(labels, np.int64)

    def subset(self, keep: np.ndarray) -> "RecordIndex":
        """Return the records that `keep` (boolean mask or indices) selects."""
        return replace(
            self,
            file_of_record=self.file_of_record[keep],
            spans=self.spans[keep],
            image_ids=self.image_ids[keep],
            sizes=self.sizes[keep],
            num_boxes=self.num_boxes[keep],
        )

    def checksum(self) -> int:
        """Return a number that tells two sets of images and numbers of boxes apart."""
        number = zlib.crc32(self.image_ids.tobytes())
        return zlib.crc32(self.num_boxes.tobytes(), number)

    def max_boxes(self) -> int:
        """Return the largest number of boxes of one record, rounded up as that of a CocoIndex."""
        return round_up(int(self.num_boxes.max(initial=1)), BOXES_MULTIPLE)


class RecordReader:
    """Reads the records of an index."""

    def __init__(self, records: RecordIndex):
        self.records = records
        self.cache: FileCache | None = None  # of the records in `extents`, by `--cache ram`

    def read(self, record: int) -> AnnotatedImage:
        """Do what `RecordIndex.read` does."""
        if self.cache is None:
            return self.records.read(record)
        span = Span(*self.records.spans[record])
        payload = payload_of(self.cache.read(record), self.records.path(record), span)
        return annotated_image(payload, self.records.where(record))

    def extents(self) -> list[Extent]:
        """Return the bytes of each record: its header, its payload and the payload's checksum."""
        extents = []
        for record, (offset, length) in enumerate(self.records.spans.tolist()):
            size = HEADER.size + length + FOOTER.size
            extents.append(Extent(self.records.path(record), offset, size))
        return extents


def wrong_size(where: str, of_record: tuple[int, int], annotated: tuple[int, int]) -> UserError:
    """Return the error for a record of another (height, width) than the annotation file says."""
    height, width = of_record
    annotated_height, annotated_width = annotated
    return UserError(
        f"{where}: its image is {width} x {height} pixels, {annotated_width} x {annotated_height} "
        "in the annotation file",
        "give the file that the records were converted from, or convert them again",
    )


def names_of_categories(
    category_ids: tuple[int, ...], categories: Collection[tuple[int, str]]
) -> tuple[str, ...]:
    """Return the names of the classes: COCO's for COCO's category ids, else those of `categories`.

    These are pairs of an id and its name. An id without a name, with several, or with that of
    another id is its own name.
    """
    if category_ids == COCO_CATEGORY_IDS:
        return COCO_CLASSES
    num_names = Counter(category_id for category_id, _ in categories)
    num_ids = Counter(name for _, name in categories)
    names = {}
    for category_id, name in categories:
        if name and num_names[category_id] == 1 and num_ids[name] == 1:
            names[category_id] = name
    return tuple(names.get(category_id, str(category_id)) for category_id in category_ids)


def read_index(pattern: str, flag: str) -> RecordIndex:
    """Return the index of the files that a glob pattern matches, with COCO's classes.

    Raise UserError where there is no record; it names the flag that the pattern came from.
    """
    files = match_files(pattern, flag)
    file_of_record = []
    entries = []
    categories = set()
    for number, path in enumerate(files):
        file_entries, file_categories = _read_entries(path)
        categories |= file_categories
        entries.extend(file_entries)
        file_of_record.extend([number] * len(file_entries))
    if not entries:
        raise UserError(f"{flag}={pattern}: all {len(files)} files are empty; convert them again")
    return RecordIndex(
        files=np.array(files),
        file_of_record=np.array(file_of_record, np.int32),
        spans=np.array([entry.span for entry in entries], np.int64),
        image_ids=np.array([entry.image_id for entry in entries], np.int64),
        sizes=np.array([entry.size for entry in entries], np.int64),
        num_boxes=np.array([entry.num_boxes for entry in entries], np.int64),
        categories=tuple(sorted(categories)),
        category_ids=COCO_CATEGORY_IDS,
        class_names=COCO_CLASSES,
    )


class _Entry(NamedTuple):
    span: Span
    image_id: int
    size: tuple[int, int]  # height, width; 0 where the record does not say it
    num_boxes: int


def _read_entries(path: str) -> tuple[list[_Entry], set[tuple[int, str]]]:
    """Return an entry for each record of a file, and the categories of their boxes."""
    entries = []
    categories = set()
    for span, payload in scan_records(path, verify=False):
        where = describe(path, span.offset)
        features = decode(payload, where)
        category_ids = values(features, CATEGORY, int, where)
        names = values(features, CATEGORY_NAME, bytes, where)
        size = image_size(features, where) or (0, 0)
        entries.append(_Entry(span, image_id(features, where), size, len(category_ids)))
        if len(names) != len(category_ids):
            names = [b""] * len(category_ids)
        categories.update(zip(category_ids, names, strict=True))
    decoded = {(category_id, name.decode(errors="replace")) for category_id, name in categories}
    return entries, decoded
