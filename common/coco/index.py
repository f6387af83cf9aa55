"""The annotation index: a COCO file as flat arrays, checked once, when it is read."""

import json
import os
import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.arithmetic import round_up
from common.errors import UserError


class Severity(Enum):
    """What happens to an entry that breaks a rule."""

    ERROR = "the run stops"
    SKIP = "the annotation is left out"
    KEEP = "the annotation is used"


class Rule(NamedTuple):
    """A rule of the annotation file: the text for its breach, and what happens then."""

    text: str
    severity: Severity
    file: str = ""  # in an index of several annotation files: the one that was checked

    def line(self, entries: list[str], limit: int | None) -> str:
        """Return the line of the report: how many entries break the rule, and `limit` of them."""
        label = "error" if self.severity is Severity.ERROR else "note"
        prefix = f"{self.file}: " if self.file else ""
        return f"{prefix}{label}: {self.summary(entries, limit)}"

    def summary(self, entries: list[str], limit: int | None) -> str:
        """Return the line without its beginning, to be joined with others."""
        examples = "; ".join(entries[:limit])
        return f"{self.text}: {len(entries)} ({examples})"


BAD_IMAGE = Rule("image id or size unusable, or id repeated", Severity.ERROR)
BAD_CATEGORY = Rule("category id or name unusable or repeated", Severity.ERROR)
BAD_ANNOTATION_ID = Rule("annotation id unusable or repeated", Severity.ERROR)
UNKNOWN_CATEGORY = Rule("unknown category", Severity.ERROR)
BAD_BOX = Rule("box that is not 4 finite numbers", Severity.ERROR)
NEGATIVE_SIZE = Rule("box of negative size", Severity.ERROR)
BAD_AREA_OR_FLAG = Rule("area, iscrowd or ignore out of range", Severity.ERROR)
UNKNOWN_IMAGE = Rule("unknown image, annotation skipped", Severity.SKIP)
EMPTY_BOX = Rule("zero-size box, skipped", Severity.SKIP)
BOX_OUTSIDE = Rule("box wholly outside its image, skipped", Severity.SKIP)
BOX_OVER_EDGE = Rule("box more than 1 pixel over the edge, kept", Severity.KEEP)
IMAGE_FILE_MISSING = Rule("image file missing", Severity.ERROR)

# The 80 classes of COCO in the order of their category ids, for weights that bring no names.
COCO_CLASSES = tuple(Path(__file__).with_name("class_names.txt").read_text().splitlines())

# Polygons are nine tenths of the file and unused: without them it is read 5 times as fast, in a
# third of the memory. A key must follow; inside a JSON string the second quote would be escaped.
POLYGONS = re.compile(rb'"segmentation":\s*\[[^"{}]*\]\s*,(?=\s*")')

TABLE_COLUMNS = [
    ("id", np.int64),
    ("image_id", np.int64),
    ("label", np.int64),  # a position in class_names
    ("box_xywh", np.float64, 4),  # pixels
    ("area", np.float64),  # of the mask, in pixels; NaN where the file has none
    ("crowd", np.bool_),
    ("ignore", np.bool_),
    ("usable", np.bool_),  # the box has an area, inside its image
]
SIZE_LIMIT = 2**31  # pixels: sizes are kept as int32
EXACT_LIMIT = 2**53  # float64 holds all integers below
BOXES_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """I images in file order and their A annotations, sorted by image.

    Flat arrays only: a forked worker reads them without touching a reference count, so that the
    memory stays shared.
    """

    annotation_file: str
    image_dir: str
    image_ids: np.ndarray  # (I,) int64
    sizes: np.ndarray  # (I, 2) int32 height, width
    file_names: np.ndarray  # (I,) 'S', UTF-8
    offsets: np.ndarray  # (I + 1,) int64: the annotations of image i are offsets[i]:offsets[i + 1]
    table: np.recarray  # (A,) of TABLE_COLUMNS
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # of each class; -1 for one that the file does not have
    report: dict[Rule, list[str]]  # the entries that break each rule that was checked

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, i: int) -> str:
        """Return the path of the file of image `i`."""
        return os.path.join(self.image_dir, self.file_names[i].decode())

    def annotations(self, i: int) -> np.recarray:
        """Return the annotations of image `i`, in file order."""
        return self.table[self.offsets[i] : self.offsets[i + 1]]

    def subset(self, keep: np.ndarray) -> "CocoIndex":
        """Return the index of the images in `keep`, a boolean mask or positions in any order."""
        counts = np.diff(self.offsets)[keep]
        offsets = np.append(0, np.cumsum(counts))
        # The annotations of an image move from their old offset to their new one.
        shifts = self.offsets[:-1][keep] - offsets[:-1]
        rows = np.arange(offsets[-1]) + np.repeat(shifts, counts)
        return replace(
            self,
            image_ids=self.image_ids[keep],
            sizes=self.sizes[keep],
            file_names=self.file_names[keep],
            offsets=offsets,
            table=self.table[rows],
        )

    def max_boxes(self) -> int:
        """Return the largest number of annotations of one image, rounded up to a positive 16."""
        largest = np.diff(self.offsets).max(initial=1)
        return round_up(int(largest), BOXES_MULTIPLE)

    def check_classes(self, names: tuple[str, ...]) -> None:
        """Put the classes that are not among `names` into the report, as an error."""
        text = f"category not among the {len(names)} classes trained on"
        unknown = [repr(name) for name in self.class_names if name not in names]
        self.report[Rule(text, Severity.ERROR)] = unknown

    def broken_rules(self) -> dict[Rule, list[str]]:
        """Return the rules that are broken, with the entries that break them."""
        return {rule: entries for rule, entries in self.report.items() if entries}

    def lines(self, limit: int | None = 5) -> list[str]:
        """Return a line for each broken rule, with its count and up to `limit` examples."""
        return [rule.line(entries, limit) for rule, entries in self.broken_rules().items()]

    def raise_errors(self) -> None:
        """Raise all errors of the report together as one UserError, if there are any."""
        errors = []
        for rule, entries in self.broken_rules().items():
            if rule.severity is Severity.ERROR:
                errors.append(rule.summary(entries, limit=3))
        if errors:
            hint = "train.py --check_data lists them in full"
            raise UserError(f"{self.annotation_file}: {'; '.join(errors)}; {hint}")


def read_index(annotation_file: str, image_dir: str, classes: tuple | None = None) -> CocoIndex:
    """Read and check a COCO annotation file (full or slim); index its usable annotations.

    `classes` are the class names of a checkpoint; labels are then positions among them. Raise one
    UserError with all errors, files missing in `image_dir` among them.
    """
    index = read_annotations(annotation_file, image_dir)
    names = tuple(classes or index.class_names)
    index.check_classes(names)
    index.report[IMAGE_FILE_MISSING] = _missing_files(index)
    index.raise_errors()

    table = index.table[index.table.usable]
    new_labels = np.array([names.index(name) for name in index.class_names])
    table.label = new_labels[table.label]
    num_usable_before = np.append(0, np.cumsum(index.table.usable))
    id_of_name = dict(zip(index.class_names, index.category_ids, strict=True))
    return replace(
        index,
        table=table,
        offsets=num_usable_before[index.offsets],
        class_names=names,
        category_ids=tuple(id_of_name.get(name, -1) for name in names),
    )


def _missing_files(index: CocoIndex) -> list[str]:
    """Return the paths of the images that are not there; each folder is listed only once."""
    files_in_folder: dict[str, set[str]] = {}
    missing = []
    for i in range(len(index)):
        path = index.path(i)
        folder, name = os.path.split(path)
        if folder not in files_in_folder:
            files_in_folder[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in files_in_folder[folder]:
            missing.append(path)
    return missing


@np.errstate(invalid="ignore")  # NaN and infinity are compared and cast; the report has them
def read_annotations(annotation_file: str, image_dir: str = "") -> CocoIndex:
    """Read a COCO annotation file; index all annotations of its images, with a report on them.

    The arrays mean nothing where the report has errors. Raise UserError only for what is no COCO
    file.
    """
    images, categories, annotations = _read_json(annotation_file)
    report: dict[Rule, list[str]] = {}

    image_ids = _numbers(images, "id")
    heights = _numbers(images, "height")
    widths = _numbers(images, "width")
    good_size = (heights > 0) & (heights < SIZE_LIMIT) & (widths > 0) & (widths < SIZE_LIMIT)
    report[BAD_IMAGE] = _describe(images, _unusable_ids(image_ids) | ~good_size)

    category_ids = _numbers(categories, "id")
    class_names = [str(category.get("name", "")) for category in categories]
    bad_category = _unusable_ids(category_ids) | _unusable_names(class_names)
    report[BAD_CATEGORY] = _describe(categories, bad_category)

    ids = _numbers(annotations, "id")
    id_of_image = _numbers(annotations, "image_id")
    id_of_category = _numbers(annotations, "category_id")
    area = _numbers(annotations, "area")
    crowd = np.nan_to_num(_numbers(annotations, "iscrowd"))
    ignore = np.nan_to_num(_numbers(annotations, "ignore"))
    box_xywh = _boxes(annotations)
    image = _positions(id_of_image, image_ids)
    label = _positions(id_of_category, category_ids)

    x, y, width, height = box_xywh.T
    right = x + width
    bottom = y + height
    image_width = widths[image]
    image_height = heights[image]
    outside = (x >= image_width) | (y >= image_height) | (right <= 0) | (bottom <= 0)
    over_edge = (x < -1) | (y < -1) | (right > image_width + 1) | (bottom > image_height + 1)
    good_flags = np.isin(crowd, (0, 1)) & np.isin(ignore, (0, 1))
    breaches = {
        BAD_ANNOTATION_ID: _unusable_ids(ids),
        UNKNOWN_CATEGORY: label < 0,
        BAD_BOX: ~np.isfinite(box_xywh).all(axis=1),
        NEGATIVE_SIZE: (width < 0) | (height < 0),
        BAD_AREA_OR_FLAG: (area < 0) | ~good_flags,
        UNKNOWN_IMAGE: image < 0,
        EMPTY_BOX: (width == 0) | (height == 0),
        BOX_OUTSIDE: outside,
        BOX_OVER_EDGE: over_edge,
    }
    # An annotation is reported by the first of the rules that it breaks.
    usable = np.ones(len(annotations), dtype=bool)
    for rule, broken in breaches.items():
        report[rule] = _describe(annotations, broken & usable)
        if rule.severity is not Severity.KEEP:
            usable &= ~broken

    columns = [ids, id_of_image, label, box_xywh, area, crowd, ignore, usable]
    table = np.rec.fromarrays(columns, dtype=TABLE_COLUMNS)
    by_image = np.argsort(image, kind="stable")
    num_without_image = np.count_nonzero(image < 0)  # these come first
    by_image = by_image[num_without_image:]
    file_names = [str(entry.get("file_name", "")) for entry in images]
    return CocoIndex(
        annotation_file=str(annotation_file),
        image_dir=str(image_dir),
        image_ids=image_ids.astype(np.int64),
        sizes=np.stack([heights, widths], axis=1).astype(np.int32),
        file_names=np.array([name.encode(errors="replace") for name in file_names]),
        offsets=np.searchsorted(image[by_image], np.arange(len(images) + 1)),
        table=table[by_image],
        class_names=tuple(class_names),
        category_ids=tuple(category_ids.astype(np.int64).tolist()),
        report=report,
    )


def _read_json(annotation_file: str) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the images, categories and annotations of a file.

    An entry that is no dictionary becomes an empty one. Raise UserError for a file that is not
    JSON or has no images or categories.
    """
    try:
        with open(annotation_file, "rb") as file:
            content = file.read()
    except OSError as error:
        raise _no_coco_file(annotation_file, error.strerror) from error
    reason = "no images and categories in JSON, or cut short"
    try:
        coco = json.loads(POLYGONS.sub(b"", content))
        images = coco["images"]
        categories = coco["categories"]
        annotations = coco.get("annotations", [])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _no_coco_file(annotation_file, reason) from error
    are_lists = all(isinstance(entries, list) for entries in (images, categories, annotations))
    if not (are_lists and images and categories):
        raise _no_coco_file(annotation_file, reason)
    return _dictionaries(images), _dictionaries(categories), _dictionaries(annotations)


def _no_coco_file(annotation_file: str, reason: str) -> UserError:
    return UserError(f"{annotation_file}: {reason}; give an instances_*.json file")


def _dictionaries(entries: list) -> list[dict]:
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _numbers(entries: list[dict], key: str) -> np.ndarray:
    """Return a value of each entry (n,) float64: NaN where absent, -inf where it is no number."""
    return np.array([_number(entry.get(key, np.nan)) for entry in entries], dtype=np.float64)


def _boxes(annotations: list[dict]) -> np.ndarray:
    """Return `bbox` of each annotation (n, 4) float64, NaN where it is not a list of four."""
    boxes = np.full((len(annotations), 4), np.nan)
    for i, annotation in enumerate(annotations):
        box = annotation.get("bbox")
        if isinstance(box, list) and len(box) == 4:
            boxes[i] = [_number(value) for value in box]
    return boxes


def _number(value: object) -> float:
    """Return the value; -inf where it is no number, or so large that float64 may not hold it."""
    if type(value) not in (int, float, bool) or abs(value) >= EXACT_LIMIT:
        return -np.inf
    return value


def _unusable_ids(ids: np.ndarray) -> np.ndarray:
    """True where an id is no integer from 0 on, or comes again later."""
    is_last = _positions(ids, ids) == np.arange(len(ids))
    is_natural = (ids >= 0) & (ids % 1 == 0)
    return ~(is_last & is_natural)


def _unusable_names(names: list[str]) -> np.ndarray:
    """True where a name is empty or came before."""
    unusable = [name == "" or name in names[:i] for i, name in enumerate(names)]
    return np.array(unusable, dtype=bool)


def _positions(ids: np.ndarray, known_ids: np.ndarray) -> np.ndarray:
    """Return the position of each id among the known ones, -1 where it is not among them.

    Of equal known ids the last counts.
    """
    position_of = {known: position for position, known in enumerate(known_ids.tolist())}
    positions = [position_of.get(ident, -1) for ident in ids.tolist()]
    return np.array(positions, dtype=np.int64)


def _describe(entries: list[dict], broken: np.ndarray) -> list[str]:
    """Return how the report names the entries that break a rule, `broken` (n,) bool."""
    return [_description(entries[i], i) for i in np.flatnonzero(broken)]


def _description(entry: dict, number: int) -> str:
    ident = entry.get("id")
    if "image_id" not in entry:
        return f"entry {number} with id {ident!r}"
    image = entry["image_id"]
    category = entry.get("category_id")
    return f"image {image!r} annotation {ident!r} category {category!r}"


def find_coco(
    data_path: str, split: str, annotations: str = "", images: str = ""
) -> tuple[str, str]:
    """Return the annotation file and the image folder of a split of COCO 2017 in `data_path`.

    `split` is "train" or "val"; `annotations` and `images` name another file or folder instead.
    Raise UserError for what is missing.
    """
    folder = data_path or "."
    if annotations:
        candidates = [annotations]
    else:
        candidates = [
            f"{folder}/annotations/instances_{split}2017.json",
            f"{folder}/annotations/bbox_only_instances_{split}2017.json",
        ]
    image_dir = images or os.path.join(folder, f"{split}2017")
    files = [file for file in candidates if os.path.isfile(file)]
    if not files or not os.path.isdir(image_dir):
        needed = f"{' or '.join(candidates)}, and the folder {image_dir}"
        raise UserError(f"--data_path {folder}: needs {needed}; download_dataset.sh fetches it")
    return files[0], image_dir
