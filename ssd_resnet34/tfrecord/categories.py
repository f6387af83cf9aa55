"""The category ids of a run's classes, where `--category_ids` does not say them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.coco.index import COCO_CLASSES, read_annotations
from common.errors import UserError
from ssd_resnet34.tfrecord.config import COCO_CATEGORY_IDS
from ssd_resnet34.tfrecord.index import CATEGORY_REMEDY, RecordIndex

COCO_CATEGORIES = tuple(zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True))
CATEGORIES_SHOWN = 5  # of those that are unknown


class Categories(NamedTuple):
    """The category id of each class, and where they are from."""

    ids: tuple[int, ...]
    source: str

    @property
    def are_cocos(self) -> bool:
        return self.ids == COCO_CATEGORY_IDS

    def line(self) -> str:
        """Return the line of the log, which says the ids and their source."""
        ids = ", ".join(str(category_id) for category_id in self.ids)
        return f"{len(self.ids)} classes, from {self.source}, with the category ids {ids}"


def find_categories(
    from_flag: Sequence[int] | None,
    resumed: Sequence[int] | None,
    annotation_file: str,
    records: RecordIndex,
) -> Categories:
    """Return the category ids of the first of these sources that is there.

    They are `--category_ids`, the run that is resumed, the annotation file (a run that does not
    evaluate may name one that is not there) and the records. The ids of the last two are sorted, so
    that both give the same classes. Raise UserError for a bad annotation file.
    """
    if from_flag is not None:
        return Categories(tuple(from_flag), "--category_ids")
    if resumed is not None:
        return Categories(tuple(resumed), "the run that is resumed")
    if annotation_file and Path(annotation_file).is_file():
        names = [name for _, name in records.categories]
        annotations = read_annotations(annotation_file, classes=names)
        annotations.raise_errors()
        ids = tuple(sorted(annotations.category_ids))
        return Categories(ids, f"--val_json_file={annotation_file}")
    return Categories(ids_of_records(records), "the records")


def ids_of_records(records: RecordIndex) -> tuple[int, ...]:
    """Return the sorted category ids of the records' boxes, or COCO's 80.

    COCO's are taken where each id has the name that COCO has for it: few images do not show all 80.
    """
    if set(records.categories) <= set(COCO_CATEGORIES):
        return COCO_CATEGORY_IDS
    ids = {category_id for category_id, _ in records.categories}
    return tuple(sorted(ids))


def require_known_categories(records: RecordIndex) -> None:
    """Raise UserError where boxes have a category that is no class of `records.category_ids`."""
    unknown = []
    for category_id, name in records.categories:
        if category_id not in records.category_ids:
            unknown.append(f"{category_id} {name!r}")
    if unknown:
        raise UserError(
            f"{records.path(0)}: {len(unknown)} categories of boxes are none of the "
            f"{len(records.category_ids)} classes: {', '.join(unknown[:CATEGORIES_SHOWN])}",
            CATEGORY_REMEDY,
        )
