"""Place, image id and number of boxes of every record of a set of shards: read once, at the start.

Headers are verified; images are skipped over, their pages stay unread. So an epoch can be shuffled
as a whole, shared out evenly over any number of ranks whatever the number of files, and taken up at
any record. Contents are verified when they are read.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from ssd_resnet34.tfrecord.config import COCO_CATEGORY_IDS
from ssd_resnet34.tfrecord.example import (
    AnnotatedImage,
    annotated_image,
    decode,
    image_apart,
    image_id,
    values,
)
from ssd_resnet34.tfrecord.records import HEADER, Span, match_files, read_record, read_spans

CATEGORY = "image/object/class/label"


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """R records in the order of sorted files; flat arrays, which forked workers share."""

    files: np.ndarray  # (F,) 'U'
    file: np.ndarray  # (R,) int32 position in files
    spans: np.ndarray  # (R, 2) int64 offset of the header, length of the payload
    image_ids: np.ndarray  # (R,) int64; -1 where the record has none
    boxes: np.ndarray  # (R,) int64 number of boxes
    category_ids: tuple[int, ...]  # of each class

    def __len__(self) -> int:
        return len(self.file)

    @property
    def class_names(self) -> tuple[str, ...]:
        """COCO's, else the category ids."""
        if self.category_ids == COCO_CATEGORY_IDS:
            return COCO_CLASSES
        return tuple(map(str, self.category_ids))

    def read(self, i: int) -> AnnotatedImage:
        """Record `i`, verified. Raises UserError for a damaged one."""
        return annotated_image(read_record(self.path(i), Span(*self.spans[i])), self.where(i))

    def path(self, i: int) -> str:
        return str(self.files[self.file[i]])

    def where(self, i: int) -> str:
        """File and place of a record, as error messages begin."""
        return f"{self.path(i)}: record at byte {self.spans[i][0]}"

    def subset(self, keep: np.ndarray) -> "RecordIndex":
        """The records that `keep` (boolean mask or positions) names."""
        columns = ("file", "spans", "image_ids", "boxes")
        return replace(self, **{key: getattr(self, key)[keep] for key in columns})

    def max_boxes(self) -> int:
        """The largest number of boxes of one record, rounded up to a positive 16."""
        return max(16, -(-int(self.boxes.max(initial=0)) // 16) * 16)


def read_index(
    pattern: str, flag: str, category_ids: tuple[int, ...] = COCO_CATEGORY_IDS
) -> RecordIndex:
    """The records of the files that a pattern matches. Raises UserError where there is none."""
    files = match_files(pattern, flag)
    found = [[(number, *entry) for entry in _entries(path)] for number, path in enumerate(files)]
    table = np.array([row for rows in found for row in rows], np.int64).reshape(-1, 5)
    if not len(table):
        raise UserError(f"{flag}={pattern}: all {len(files)} files are empty; convert them again")
    file, spans, ids, boxes = table[:, 0], table[:, 1:3], table[:, 3], table[:, 4]
    return RecordIndex(np.array(files), file.astype(np.int32), spans, ids, boxes, category_ids)


def _entries(path: str) -> Iterator[tuple[int, int, int, int]]:
    """Offset, length, image id and number of boxes of every record of a file."""
    spans = list(read_spans(path))
    if not spans:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for span in spans:
            start = span.offset + HEADER.size
            end = start + span.length
            where = f"{path}: record at byte {span.offset}"
            apart = image_apart(content, start, end)
            features = apart[0] if apart else decode(content[start:end], where)
            yield *span, image_id(features, where), len(values(features, CATEGORY, int, where))
