"""The category ids and the names of a run's classes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common.coco.index import COCO_CLASSES, read_annotations
from common.errors import UserError
from ssd_resnet34.tfrecord.config import COCO_CATEGORY_IDS
from ssd_resnet34.tfrecord.index import CATEGORY_REMEDY, RecordIndex, names_of_categories

COCO_CATEGORIES = tuple(zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True))
CATEGORIES_SHOWN = 5  # of those that are unknown


class Categories(NamedTuple):
    """The category id and the name of each class, and where they are from."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    source: str

    @property
    def are_cocos(self) -> bool:
        return self.ids == COCO_CATEGORY_IDS

    def line(self) -> str:
        """Return the line of the log, which says the ids, the names and their source."""
        classes = []
        for category_id, name in zip(self.ids, self.names, strict=True):
            classes.append(f"{category_id} {name}")
        return f"{len(self.ids)} classes, from {self.source}: {', '.join(classes)}"

    def in_order(self, names: Sequence[str] | None) -> "Categories":
        """Return the classes in the order of `names` if these are the same, else as they are."""
        if names is None or sorted(names) != sorted(self.names):
            return self
        id_of_name = dict(zip(self.names, self.ids, strict=True))
        return self._replace(ids=tuple(id_of_name[name] for name in names), names=tuple(names))

    def of(self, records: RecordIndex) -> RecordIndex:
        """Return the index of the same records with these classes."""
        return replace(records, category_ids=self.ids, class_names=self.names)


def find_categories(
    from_flag: Sequence[int] | None,
    resumed: Mapping | None,
    annotation_file: str,
    records: RecordIndex,
    usual_order: Sequence[str] | None = None,
) -> Categories:
    """Return the classes of the first of these sources that is there.

    They are `--category_ids`, the state of the run that is `resumed`, the annotation file (a run
    that does not evaluate may name one that is not there) and the records. The classes of the last
    two are in `usual_order` if it has the same names, else in that of their ids, so that both give
    the same. The names of ids that are given by the flag are those in the records. Raise UserError
    for a bad annotation file.
    """
    if from_flag is not None:
        ids = tuple(from_flag)
        return Categories(ids, names_of_categories(ids, records.categories), "--category_ids")
    if resumed is not None:
        ids = tuple(resumed["category_ids"])
        return Categories(ids, tuple(resumed["classes"]), "the run that is resumed")
    if annotation_file and Path(annotation_file).is_file():
        names = [name for _, name in records.categories]
        annotations = read_annotations(annotation_file, classes=names)
        annotations.raise_errors()
        pairs = list(zip(annotations.category_ids, annotations.class_names, strict=True))
        ids = tuple(sorted(annotations.category_ids))
        source = f"--val_json_file={annotation_file}"
        found = Categories(ids, names_of_categories(ids, pairs), source)
    else:
        ids = ids_of_records(records)
        found = Categories(ids, names_of_categories(ids, records.categories), "the records")
    return found.in_order(usual_order)


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
