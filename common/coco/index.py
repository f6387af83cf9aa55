"""The annotation index: a COCO file as flat arrays, checked once, when it is read."""

import gzip
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.arithmetic import round_up
from common.coco.class_names import spelled_as
from common.errors import UserError


class Severity(Enum):
    """What happens to an entry that breaks a rule."""

    ERROR = "the run stops"
    SKIP = "the annotation is not trained on; an evaluation counts it, as pycocotools does"
    NOTE = "it is said, nothing more"


class Rule(NamedTuple):
    """A rule of the annotation file: the text for its breach, and what happens then."""

    text: str
    severity: Severity
    file: str = ""  # in an index of several annotation files: the one that was checked

    def line(self, findings: "Findings", limit: int | None) -> str:
        """Return the line of the report: how many entries break the rule, and `limit` of them."""
        label = "error" if self.severity is Severity.ERROR else "note"
        prefix = f"{self.file}: " if self.file else ""
        return f"{prefix}{label}: {self.summary(findings, limit)}"

    def summary(self, findings: "Findings", limit: int | None) -> str:
        """Return the line without its beginning, to be joined with others."""
        consequence = ", not trained on" if self.severity is Severity.SKIP else ""
        examples = "; ".join(findings.examples[:limit])
        return f"{self.text}{consequence}: {findings.count} ({examples})"


class Findings(NamedTuple):
    """The entries of a file that break a rule: how many, and how the report names some of them."""

    count: int
    examples: list[str]

    @staticmethod
    def of(entries: list[str]) -> "Findings":
        """Return findings of which each is an example."""
        return Findings(len(entries), entries)


BAD_IMAGE_ID = Rule("image id that is no whole number from 0 to 2**53", Severity.ERROR)
TEXT_IMAGE_IDS = Rule(
    "image id that is a text: the images are numbered in their order, in results too", Severity.NOTE
)
IMAGE_LISTED_AGAIN = Rule("image listed again, taken once", Severity.NOTE)
REPEATED_IMAGE_ID = Rule("image id of several images", Severity.ERROR)
BAD_IMAGE_SIZE = Rule("image width or height that is no number above 0", Severity.ERROR)
BAD_CATEGORY_ID = Rule("category id that is no whole number from 0 to 2**53", Severity.ERROR)
REPEATED_CATEGORY_ID = Rule("category id of several names", Severity.ERROR)
BAD_CATEGORY_NAME = Rule("category without a name", Severity.ERROR)
REPEATED_CATEGORY_NAME = Rule("category name of several ids that boxes use", Severity.ERROR)
CATEGORY_LISTED_AGAIN = Rule("category listed again, taken once", Severity.NOTE)
UNUSED_ROOT = Rule("category that no box uses and others lie under, left out", Severity.NOTE)
UNUSED_NAMESAKE = Rule(
    "category that no box uses and that has the name of another, left out", Severity.NOTE
)
BAD_ANNOTATION_ID = Rule(
    "annotation id that is no whole number from 0 to 2**53, not needed", Severity.NOTE
)
REPEATED_ANNOTATION_ID = Rule("annotation id of several annotations, kept", Severity.NOTE)
UNKNOWN_CATEGORY = Rule("unknown category", Severity.ERROR)
INFINITE_MARK = Rule("box of infinities with area 0", Severity.SKIP)
BAD_BOX = Rule("box that is not 4 finite numbers", Severity.ERROR)
NEGATIVE_SIZE = Rule("box of negative size", Severity.SKIP)
BAD_AREA = Rule("area that is no number", Severity.ERROR)
BAD_CROWD = Rule("iscrowd that is not 0 or 1", Severity.ERROR)
BAD_IGNORE = Rule("ignore that is not 0 or 1", Severity.ERROR)
UNKNOWN_IMAGE = Rule("annotation of an unknown image", Severity.SKIP)
EMPTY_BOX = Rule("zero-size box", Severity.SKIP)
BOX_OUTSIDE = Rule("box wholly outside its image", Severity.SKIP)
BOX_OVER_EDGE = Rule("box more than 1 pixel over the edge, kept", Severity.NOTE)
ZERO_AREA = Rule("area 0 of a box with a size, taken as width times height", Severity.NOTE)
NEGATIVE_AREA = Rule("area below 0, taken as width times height", Severity.NOTE)
NORMALISED_BOXES = Rule(
    "boxes lie between 0 and 1: they are normalised, where COCO's are in pixels", Severity.ERROR
)
NO_FILE_NAME = Rule("image without file_name", Severity.ERROR)
FILE_NAME_OF_ADDRESS = Rule(
    "image without file_name, the end of its coco_url is taken", Severity.NOTE
)
FILE_FOUND_OTHERWISE = Rule("image file found under another spelling", Severity.NOTE)
IMAGE_FILE_MISSING = Rule("image file missing", Severity.ERROR)

# The 80 classes of COCO in the order of their category ids, for weights that bring no names.
COCO_CLASSES = tuple(Path(__file__).with_name("class_names.txt").read_text().splitlines())
# Of the ids 1 to 90 COCO's detection task leaves these out (instances_val2017.json).
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in UNUSED_COCO_IDS)

# Polygons are nine tenths of the file and unused: without them it is read 5 times as fast, in a
# third of the memory. A key must follow; inside a JSON string the second quote would be escaped.
POLYGONS = re.compile(rb'"segmentation":\s*\[[^"{}]*\]\s*,(?=\s*")')

TABLE_COLUMNS = [
    ("id", np.int64),  # -1 where the file has no number
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
# Where nearly all corners lie, if boxes are normalised: a little outside of 0 to 1, because boxes
# reach over the edge and roundings add up.
NORMALISED_RANGE = (-0.5, 1.5)
SHARE_OF_NORMALISED = 0.9
FORMAT_ONLY_HINT = "give a val set that has some; evaluate.py --format_only needs none"
CHECK_HINT = "train.py --check_data lists them in full"
EXAMPLES_KEPT = 20  # of a rule, unless all are asked for
GZIP_START = b"\x1f\x8b"
OTHER_ENCODING = "gbk"  # of files written on a Chinese Windows
OTHER_ENCODING_READ = Rule(
    f"file is not UTF-8 and was read as {OTHER_ENCODING.upper()}", Severity.NOTE
)


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
    file_names: np.ndarray  # (I,) 'S', of `name_to_bytes`
    # (I, 2) float32: the largest bottom and right of any box of the image, in pixels; also of one
    # that lies outside the image
    far_corners: np.ndarray
    offsets: np.ndarray  # (I + 1,) int64: the annotations of image i are offsets[i]:offsets[i + 1]
    table: np.recarray  # (A,) of TABLE_COLUMNS
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # of each class; -1 for one that the file does not have
    report: dict[Rule, Findings]  # of each rule that was checked

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, i: int) -> str:
        """Return the path of the file of image `i`."""
        return os.path.join(self.image_dir, name_from_bytes(self.file_names[i]))

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
            far_corners=self.far_corners[keep],
            offsets=offsets,
            table=self.table[rows],
        )

    def without_unusable(self) -> "CocoIndex":
        """Return the index of the annotations that are usable."""
        num_usable_before = np.append(0, np.cumsum(self.table.usable))
        return replace(
            self, table=self.table[self.table.usable], offsets=num_usable_before[self.offsets]
        )

    def checksum(self) -> int:
        """Return a number that tells two sets of images and boxes apart, wherever they lie."""
        number = zlib.crc32(self.image_ids.tobytes())
        for column in (self.offsets, self.table.label, self.table.box_xywh):
            number = zlib.crc32(np.ascontiguousarray(column).tobytes(), number)
        return number

    def max_boxes(self) -> int:
        """Return the largest number of annotations of one image, rounded up to a positive 16."""
        largest = np.diff(self.offsets).max(initial=1)
        return round_up(int(largest), BOXES_MULTIPLE)

    def check_classes(self, names: tuple[str, ...]) -> None:
        """Report the classes that are not among `names`, as an error where boxes use them."""
        text = f"category not among the {len(names)} classes trained on"
        used = set(self.table.label.tolist())
        unknown_used = []
        unknown_unused = []
        for label, name in enumerate(self.class_names):
            if name in names:
                continue
            if label in used:
                unknown_used.append(repr(name))
            else:
                unknown_unused.append(repr(name))
        self.report[Rule(text, Severity.ERROR)] = Findings.of(unknown_used)
        unused = Rule(f"{text}, no box uses it", Severity.NOTE)
        self.report[unused] = Findings.of(unknown_unused)

    def require_annotations(self, remedy: str = FORMAT_ONLY_HINT) -> None:
        """Raise UserError where no annotation is usable: there is nothing to evaluate against."""
        if len(self.table) == 0:
            problem = f"{self.annotation_file}: no annotation to evaluate against"
            findings = "; ".join([problem, *self.lines(limit=3)])
            raise UserError(findings, remedy)

    def broken_rules(self) -> dict[Rule, Findings]:
        """Return the rules that are broken, with the entries that break them."""
        return {rule: findings for rule, findings in self.report.items() if findings.count}

    def lines(self, limit: int | None = 5) -> list[str]:
        """Return a line for each broken rule, with its count and up to `limit` examples."""
        return [rule.line(findings, limit) for rule, findings in self.broken_rules().items()]

    def raise_errors(self, hint: str = CHECK_HINT) -> None:
        """Raise all errors of the report together as one UserError, if there are any.

        An unusual encoding, which may be their cause, is among them. `hint` ends the message.
        """
        has_errors = False
        errors = []
        for rule, findings in self.broken_rules().items():
            if rule.severity is Severity.ERROR:
                has_errors = True
            if rule.severity is Severity.ERROR or rule == OTHER_ENCODING_READ:
                errors.append(rule.summary(findings, limit=3))
        if has_errors:
            raise UserError(f"{self.annotation_file}: {'; '.join(errors)}; {hint}")


def read_index(
    annotation_file: str,
    image_dir: str,
    classes: Sequence[str] | None = None,
    usual_order: Sequence[str] | None = None,
) -> CocoIndex:
    """Read and check a COCO annotation file (full or slim); index its usable annotations.

    `classes` are the class names of a checkpoint; labels are then positions among them. Without
    them the classes are those of the file, in `usual_order` if it has the same names. Names may
    have `_` for a space; those of the file stay. Raise one UserError with all errors, files missing
    in `image_dir` among them.
    """
    annotations = read_annotations(annotation_file, image_dir, classes)
    return usable_index(annotations, classes, usual_order)


def usable_index(
    index: CocoIndex,
    classes: Sequence[str] | None = None,
    usual_order: Sequence[str] | None = None,
    hint: str = CHECK_HINT,
) -> CocoIndex:
    """Return the usable annotations of an index of all annotations, with the classes of a run.

    `classes` and `usual_order` are those of `read_index`, of which this is the second half; `hint`
    is that of `raise_errors`. Raise one UserError with all errors of the file, image files that are
    missing among them.
    """
    names = index.class_names
    if classes is not None:
        names = spelled_as(classes, index.class_names)
    elif usual_order is not None:
        usual_names = spelled_as(usual_order, index.class_names)
        if set(usual_names) == set(index.class_names):
            names = usual_names
    index.check_classes(names)
    index = find_image_files(index)
    index.raise_errors(hint)

    index = index.without_unusable()
    new_labels = [names.index(name) if name in names else -1 for name in index.class_names]
    index.table.label = np.array(new_labels)[index.table.label]
    id_of_name = dict(zip(index.class_names, index.category_ids, strict=True))
    return replace(
        index,
        class_names=names,
        category_ids=tuple(id_of_name.get(name, -1) for name in names),
    )


def find_image_files(index: CocoIndex) -> CocoIndex:
    """Return the index with the names under which its image files are there.

    A file whose name differs in letter case, in the form of its accents or by backslashes is found.
    The report tells what was found so, and what is missing. Each folder is listed only once.
    """
    folders: dict[str, _Folder] = {}
    names = [name_from_bytes(encoded) for encoded in index.file_names.tolist()]
    is_there = [_is_there(index.image_dir, name, folders) for name in names]
    taken = {name for name, there in zip(names, is_there, strict=True) if there}
    file_names = []
    missing = []
    found_otherwise = []
    for i, name in enumerate(names):
        found = name
        if not is_there[i] and name:  # without a name: reported as that
            other = _other_spelling(index.image_dir, name.replace("\\", "/"), folders)
            if other is None or other in taken:
                missing.append(index.path(i))
            else:
                found_otherwise.append(f"{name!r} is {other!r}")
                taken.add(other)
                found = other
        file_names.append(name_to_bytes(found))
    index.report[IMAGE_FILE_MISSING] = Findings.of(missing)
    index.report[FILE_FOUND_OTHERWISE] = Findings.of(found_otherwise)
    return replace(index, file_names=np.array(file_names))


def name_to_bytes(name: str) -> bytes:
    """Return a file name as the index keeps it: in UTF-8, surrogates as they are."""
    return name.encode(errors="surrogatepass")


def name_from_bytes(encoded: bytes) -> str:
    """Return a file name of the index."""
    return encoded.decode(errors="surrogatepass")


class _Folder:
    """What is in a folder, by its names and by what is left of a name in other spellings."""

    def __init__(self, path: str):
        self.names = set(os.listdir(path)) if os.path.isdir(path) else set()
        self._spellings: dict[str, list[str]] = {}

    def spellings(self, name: str) -> list[str]:
        """Return the names that are equal but for letter case and the form of accents."""
        if not self._spellings:
            for other in self.names:
                self._spellings.setdefault(_without_spelling(other), []).append(other)
        return self._spellings.get(_without_spelling(name), [])


def _without_spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _folder(path: str, folders: dict[str, _Folder]) -> _Folder:
    if path not in folders:
        folders[path] = _Folder(path)
    return folders[path]


def _is_there(image_dir: str, name: str, folders: dict[str, _Folder]) -> bool:
    folder, base = os.path.split(os.path.join(image_dir, name))
    return base in _folder(folder, folders).names


def _other_spelling(image_dir: str, name: str, folders: dict[str, _Folder]) -> str | None:
    """Return the name of the only file of another spelling, None where there is none.

    Each part of the name, folders too, may be spelled in another way.
    """
    found = ""
    for part in name.split("/"):
        folder = _folder(os.path.join(image_dir, found), folders)
        if part not in folder.names and part not in ("", ".", ".."):
            spellings = folder.spellings(part)
            if len(spellings) != 1:
                return None
            part = spellings[0]
        found = os.path.join(found, part)
    return found


class _Breach(NamedTuple):
    """Which entries break a rule, and the key of the value by which they do."""

    rule: Rule
    broken: np.ndarray  # (n,) bool
    key: str


@np.errstate(invalid="ignore")  # NaN and infinity are compared and cast; the report has them
def read_annotations(
    annotation_file: str,
    image_dir: str = "",
    classes: Sequence[str] | None = None,
    examples: int | None = EXAMPLES_KEPT,
) -> CocoIndex:
    """Read a COCO annotation file; index all annotations of its images, with a report on them.

    A category that is among `classes` stays even if no box uses it. The report has up to `examples`
    of each rule, all for None. The arrays mean nothing where it has errors. Raise UserError only
    for what is no COCO file.
    """
    report = _Report(examples)
    images, categories, annotations = _read_json(annotation_file, report)

    images = _listed_once(images, report)
    image_ids, id_of_image = _image_ids(images, annotations, report)
    heights = _numbers(images, "height")
    widths = _numbers(images, "width")
    good_size = (heights > 0) & (heights < SIZE_LIMIT) & (widths > 0) & (widths < SIZE_LIMIT)
    breaches = [
        _Breach(BAD_IMAGE_ID, ~_is_id(image_ids), "id"),
        _Breach(REPEATED_IMAGE_ID, _comes_again(image_ids), "id"),
        _Breach(BAD_IMAGE_SIZE, ~good_size, "width, height"),
    ]
    _usable(images, breaches, report)
    file_names = _file_names(images, report)

    id_of_category = _numbers(annotations, "category_id")
    category_ids, class_names = _read_categories(
        categories, set(id_of_category.tolist()), classes or (), report
    )

    ids = _numbers(annotations, "id")
    area = _numbers(annotations, "area", null=np.nan)
    crowd = np.nan_to_num(_numbers(annotations, "iscrowd", null=np.nan))
    ignore = np.nan_to_num(_numbers(annotations, "ignore", null=np.nan))
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
    has_size = (width > 0) & (height > 0)
    is_id = _is_id(ids)
    breaches = [
        _Breach(UNKNOWN_CATEGORY, label < 0, "category_id"),
        _Breach(INFINITE_MARK, (box_xywh == np.inf).any(axis=1) & (area == 0), "bbox"),
        _Breach(BAD_BOX, ~np.isfinite(box_xywh).all(axis=1), "bbox"),
        _Breach(NEGATIVE_SIZE, (width < 0) | (height < 0), "bbox"),
        _Breach(BAD_AREA, np.isinf(area), "area"),
        _Breach(BAD_CROWD, ~np.isin(crowd, (0, 1)), "iscrowd"),
        _Breach(BAD_IGNORE, ~np.isin(ignore, (0, 1)), "ignore"),
        _Breach(UNKNOWN_IMAGE, image < 0, "image_id"),
        _Breach(EMPTY_BOX, ~has_size, "bbox"),
        _Breach(BOX_OUTSIDE, outside, "bbox"),
        _Breach(BOX_OVER_EDGE, over_edge, "bbox"),
        _Breach(ZERO_AREA, area == 0, "area"),
        _Breach(NEGATIVE_AREA, area < 0, "area"),
        _Breach(BAD_ANNOTATION_ID, ~is_id, "id"),
        _Breach(REPEATED_ANNOTATION_ID, is_id & _comes_again(ids), "id"),
    ]
    usable = _usable(annotations, breaches, report)
    has_no_area = (has_size & (area == 0)) | (area < 0)
    area = np.where(has_no_area, np.nan, area)  # as where the file has none
    is_normalised = usable & _are_in_range(box_xywh, NORMALISED_RANGE)
    has_pixels = max(heights.max(), widths.max()) > NORMALISED_RANGE[1]
    num_normalised = np.count_nonzero(is_normalised)
    if has_pixels and num_normalised > SHARE_OF_NORMALISED * np.count_nonzero(usable):
        report.add(NORMALISED_BOXES, annotations, is_normalised, "bbox")

    ids = np.where(is_id, ids, -1)
    columns = [ids, id_of_image, label, box_xywh, area, crowd, ignore, usable]
    table = np.rec.fromarrays(columns, dtype=TABLE_COLUMNS)
    by_image = np.argsort(image, kind="stable")
    num_without_image = np.count_nonzero(image < 0)  # these come first
    by_image = by_image[num_without_image:]
    far_corners = np.zeros((len(images), 2), np.float32)
    with_corner = by_image[(has_size & np.isfinite(box_xywh).all(axis=1))[by_image]]
    np.maximum.at(far_corners, image[with_corner], np.stack([bottom, right], axis=1)[with_corner])
    return CocoIndex(
        annotation_file=str(annotation_file),
        image_dir=str(image_dir),
        image_ids=image_ids.astype(np.int64),
        sizes=np.stack([heights, widths], axis=1).astype(np.int32),
        file_names=np.array([name_to_bytes(name) for name in file_names]),
        far_corners=far_corners,
        # The annotations of an image begin after those of all images before it.
        offsets=np.searchsorted(image[by_image], np.arange(len(images) + 1)),
        table=table[by_image],
        class_names=tuple(class_names),
        category_ids=tuple(category_ids.astype(np.int64).tolist()),
        report=report.findings,
    )


class _Report:
    """Collects the findings of each rule, with up to `limit` examples, all for None."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self.findings: dict[Rule, Findings] = {}

    def add(self, rule: Rule, entries: list[dict], broken: np.ndarray, key: str) -> None:
        """Put in which entries break a rule, `broken` (n,) bool, by their value of a key."""
        positions = np.flatnonzero(broken)
        examples = [_description(entries[i], i, key) for i in positions[: self.limit]]
        self.findings[rule] = Findings(len(positions), examples)


def _usable(entries: list[dict], breaches: list[_Breach], report: _Report) -> np.ndarray:
    """Put breaches into the report; return which entries (n,) none of them makes unusable.

    An entry is reported by the first rule that makes it unusable, and by none after that.
    """
    usable = np.ones(len(entries), dtype=bool)
    for rule, broken, key in breaches:
        report.add(rule, entries, broken & usable, key)
        if rule.severity is not Severity.NOTE:
            usable &= ~broken
    return usable


def _read_categories(
    categories: list[dict],
    used_ids: set[float],
    kept_names: Sequence[str],
    report: _Report,
) -> tuple[np.ndarray, list[str]]:
    """Return the ids and the names of the categories that are classes.

    Left out are those listed again, and of those that no box uses the namesakes of another and,
    unless they are `kept_names`, the roots of others. In a file without boxes roots stay.
    """
    ids = _numbers(categories, "id")
    names = [_category_name(category) for category in categories]
    kept_names = spelled_as(kept_names, names)
    used_names = set()
    roots = set()
    num_of_name = Counter(names)
    # Of each name the position of the category to keep, and how good it is: one that boxes use is
    # best, then one that lies under another category, then the first.
    chosen: dict[str, tuple[tuple[bool, bool], int]] = {}
    for position, category in enumerate(categories):
        name = names[position]
        parent = category.get("supercategory")
        is_used = ids[position] in used_ids
        quality = (is_used, isinstance(parent, str) and parent in num_of_name)
        if name not in chosen or quality > chosen[name][0]:
            chosen[name] = (quality, position)
        if is_used:
            used_names.add(name)
        if isinstance(parent, str) and parent != name:
            roots.add(parent)

    listed = set()
    again = []
    is_root = []
    is_namesake = []
    for position, (ident, name) in enumerate(zip(ids.tolist(), names, strict=True)):
        again.append((ident, name) in listed)
        listed.add((ident, name))
        is_unused = ident not in used_ids
        is_namesake.append(is_unused and chosen[name][1] != position)
        is_needless = is_unused and name not in used_names and name not in kept_names
        # Of two namesakes one is the root: the one chosen lies under it.
        lies_under_namesake = num_of_name[name] > 1 and chosen[name][0][1]
        is_name_of_root = name in roots and not lies_under_namesake
        is_root.append(bool(used_ids) and is_needless and is_name_of_root)
    left_out = {
        CATEGORY_LISTED_AGAIN: np.array(again),
        UNUSED_ROOT: np.array(is_root),
        UNUSED_NAMESAKE: np.array(is_namesake),
    }
    stays = np.ones(len(categories), dtype=bool)
    for rule, broken in left_out.items():
        report.add(rule, categories, broken & stays, "name")
        stays &= ~broken

    ids = ids[stays]
    names = [name for name, stay in zip(names, stays, strict=True) if stay]
    rest = [category for category, stay in zip(categories, stays, strict=True) if stay]
    has_no_name = [name == "" for name in names]
    came_before = []
    names_before = set()
    for name in names:
        came_before.append(name in names_before)
        names_before.add(name)
    breaches = [
        _Breach(BAD_CATEGORY_ID, ~_is_id(ids), "id"),
        _Breach(REPEATED_CATEGORY_ID, _comes_again(ids), "id"),
        _Breach(BAD_CATEGORY_NAME, np.array(has_no_name, dtype=bool), "name"),
        _Breach(REPEATED_CATEGORY_NAME, np.array(came_before, dtype=bool), "name"),
    ]
    _usable(rest, breaches, report)
    return ids, names


def _category_name(category: dict) -> str:
    name = category.get("name")
    return "" if name is None else str(name)


def _file_names(images: list[dict], report: _Report) -> list[str]:
    """Return the file name of each image; LVIS has only an address, which ends in it."""
    names = []
    is_from_address = np.zeros(len(images), dtype=bool)
    for number, image in enumerate(images):
        name = image.get("file_name")
        if not name and isinstance(image.get("coco_url"), str):
            name = image["coco_url"].rpartition("/")[2]
            is_from_address[number] = True
        names.append("" if name is None else str(name))
    has_no_name = np.array([name == "" for name in names], dtype=bool)
    report.add(FILE_NAME_OF_ADDRESS, images, is_from_address & ~has_no_name, "coco_url")
    report.add(NO_FILE_NAME, images, has_no_name, "file_name")
    return names


def _are_in_range(box_xywh: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Return which boxes (n, 4) have both corners within limits (n,)."""
    lowest, highest = limits
    top_left = box_xywh[:, :2]
    bottom_right = top_left + box_xywh[:, 2:]
    return (top_left >= lowest).all(axis=1) & (bottom_right <= highest).all(axis=1)


def _listed_once(images: list[dict], report: _Report) -> list[dict]:
    """Return the images without those that are listed again with the same values."""
    listed = {}
    again = np.zeros(len(images), dtype=bool)
    for number, image in enumerate(images):
        ident = str(image.get("id"))
        again[number] = listed.get(ident) == image
        listed.setdefault(ident, image)
    report.add(IMAGE_LISTED_AGAIN, images, again, "file_name")
    return [image for image, is_again in zip(images, again.tolist(), strict=True) if not is_again]


def _image_ids(
    images: list[dict], annotations: list[dict], report: _Report
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the images and those that the annotations name, both float64.

    Where images have texts as ids, their numbers from 1 on take the place of all ids.
    """
    ids = _numbers(images, "id")
    types = {type(image.get("id")) for image in images}
    is_text = ~_is_id(ids)
    if str not in types or not types <= {str, int} or not is_text.any():
        return ids, _numbers(annotations, "image_id")
    report.add(TEXT_IMAGE_IDS, images, is_text, "id")
    number_of_id = {}
    for number, image in enumerate(images, start=1):
        number_of_id.setdefault(str(image.get("id")), number)
    numbers = [number_of_id[str(image.get("id"))] for image in images]
    named = [number_of_id.get(str(entry.get("image_id")), np.nan) for entry in annotations]
    return np.array(numbers, np.float64), np.array(named, np.float64)


def _read_json(annotation_file: str, report: _Report) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the images, categories and annotations of a file, which may be a gzip file.

    An entry that is no dictionary becomes an empty one. Raise UserError for a file that is not
    JSON or has no images or categories.
    """
    try:
        with open(annotation_file, "rb") as file:
            content = file.read()
        if content.startswith(GZIP_START):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _no_coco_file(annotation_file, reason) from error
    try:
        coco = _parse(annotation_file, content, report)
    except (ValueError, RecursionError) as error:
        raise _no_coco_file(annotation_file, f"no JSON: {error}") from error
    if not isinstance(coco, dict):
        raise _no_coco_file(annotation_file, f"holds a {type(coco).__name__}, no dictionary")
    lists = []
    for key in ("images", "categories", "annotations"):
        entries = coco.get(key, [])
        if not isinstance(entries, list):
            raise _no_coco_file(annotation_file, f"its {key!r} are no list")
        if not entries and key != "annotations":
            raise _no_coco_file(annotation_file, f"has no {key!r}")
        lists.append(_dictionaries(entries))
    images, categories, annotations = lists
    return images, categories, annotations


def _parse(annotation_file: str, content: bytes, report: _Report) -> object:
    """Return what a JSON text holds, without its polygons.

    Raise ValueError for a text that is no JSON, UserError for one in an unknown encoding.
    """
    try:
        return json.loads(POLYGONS.sub(b"", content))
    except UnicodeDecodeError as error:
        text = _decode_otherwise(annotation_file, content, error)
        report.findings[OTHER_ENCODING_READ] = Findings.of([annotation_file])
        return json.loads(text)
    except ValueError:
        return json.loads(content)  # whose error names the right position


def _decode_otherwise(annotation_file: str, content: bytes, error: UnicodeDecodeError) -> str:
    """Return the text of a file that is not UTF-8, as `error` says."""
    try:
        return content.decode(OTHER_ENCODING)
    except UnicodeDecodeError:
        raise UserError(
            f"{annotation_file}: not a text in UTF-8 ({error}), and none in "
            f"{OTHER_ENCODING.upper()}",
            "save it in UTF-8, or give an instances_*.json file",
        ) from error


def _no_coco_file(annotation_file: str, reason: str) -> UserError:
    return UserError(f"{annotation_file}: {reason}; give an instances_*.json file")


def _dictionaries(entries: list) -> list[dict]:
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _numbers(entries: list[dict], key: str, null: float = -np.inf) -> np.ndarray:
    """Return a value of each entry (n,) float64 as `_number` gives it.

    It is NaN where the value is absent, and `null` where the file says so.
    """
    numbers = []
    for entry in entries:
        value = entry.get(key, np.nan)
        numbers.append(null if value is None else _number(value))
    return np.array(numbers, dtype=np.float64)


def _boxes(annotations: list[dict]) -> np.ndarray:
    """Return `bbox` of each annotation (n, 4) float64, NaN where it is not a list of four."""
    boxes = np.full((len(annotations), 4), np.nan)
    for i, annotation in enumerate(annotations):
        box = annotation.get("bbox")
        if isinstance(box, list) and len(box) == 4:
            boxes[i] = [_number(value) for value in box]
    return boxes


def _number(value: object) -> float:
    """Return a number, also one that is written as a text.

    It is -inf where there is no number, inf where float64 may not hold it exactly.
    """
    if isinstance(value, str):
        if "_" in value:  # which Python would pass over
            return -np.inf
        try:
            value = float(value)
        except ValueError:
            return -np.inf
    if type(value) not in (int, float, bool):
        return -np.inf
    if abs(value) >= EXACT_LIMIT:
        return np.inf
    return value


def _is_id(ids: np.ndarray) -> np.ndarray:
    """True where an id is a whole number from 0 on."""
    return (ids >= 0) & (ids % 1 == 0)


def _comes_again(ids: np.ndarray) -> np.ndarray:
    """True where an id comes again later."""
    return _positions(ids, ids) != np.arange(len(ids))


def _positions(ids: np.ndarray, known_ids: np.ndarray) -> np.ndarray:
    """Return the position of each id among the known ones, -1 where it is not among them.

    Of equal known ids the last counts.
    """
    position_of = {known: position for position, known in enumerate(known_ids.tolist())}
    positions = [position_of.get(ident, -1) for ident in ids.tolist()]
    return np.array(positions, dtype=np.int64)


def _description(entry: dict, number: int, keys: str) -> str:
    """Return how the report names an entry and its values of one or several `keys`."""
    values = ", ".join(f"{key} {entry.get(key)!r:.60}" for key in keys.split(", "))
    ident = entry.get("id")
    if "image_id" not in entry:
        return f"entry {number} with id {ident!r}: {values}"
    image = entry["image_id"]
    category = entry.get("category_id")
    return f"image {image!r} annotation {ident!r} category {category!r}: {values}"
