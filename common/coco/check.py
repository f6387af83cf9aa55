"""The rules at the door: a COCO annotation file is checked once, when it is opened.

An error stops the run; a note is told and the run goes on (such annotations are skipped where the
rule says so). `check_data` (`--check_data`) also decodes every image and lists all that it finds.
"""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import numpy as np
from tqdm import tqdm

from common.coco.images import read_image
from common.npu.errors import UserError

LIMIT = 10**9  # pixels; nothing real is larger, and it fits int32


@dataclass
class DataReport:
    """What was found: rule -> every example of it, for errors and for notes."""

    errors: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def error(self, rule: str, *examples: str) -> None:
        if examples:
            self.errors.setdefault(rule, []).extend(examples)

    def note(self, rule: str, *examples: str) -> None:
        if examples:
            self.notes.setdefault(rule, []).extend(examples)

    def lines(self, limit: int | None = 5) -> list[str]:
        """One line a rule with its count and up to `limit` examples (None: all), errors first."""
        return [
            f"{kind}: {_line(rule, examples, limit)}"
            for kind, found in (("error", self.errors), ("note", self.notes))
            for rule, examples in found.items()
        ]

    def raise_errors(self, annotation_file: str) -> None:
        """Raise all errors together as one UserError, if there are any."""
        if self.errors:
            problems = "; ".join(_line(rule, found, 3) for rule, found in self.errors.items())
            plural = "" if len(self.errors) == 1 else "s"
            raise UserError(
                f"{annotation_file}: {len(self.errors)} problem{plural}: {problems}; "
                "run with --check_data for the full list"
            )


def _line(rule: str, examples: list[str], limit: int | None) -> str:
    more = "; ..." if limit is not None and len(examples) > limit else ""
    return f"{rule}: {len(examples)} ({'; '.join(examples[:limit])}{more})"


TABLE = np.dtype(
    [
        ("id", np.int64),
        ("image", np.int64),  # position of the image, -1 where the file does not have it
        ("category", np.int64),  # position of the category
        ("box_xywh", np.float64, 4),  # pixels
        ("area", np.float64),  # NaN where the file has none
        ("crowd", bool),
        ("ignore", bool),
        ("usable", bool),  # of a known image, with a positive area inside it
    ]
)


@dataclass(frozen=True, eq=False)
class Annotations:
    """An annotation file as arrays, everything in file order: I images, A annotations."""

    image_ids: np.ndarray  # (I,) int64
    sizes: np.ndarray  # (I, 2) int32 height, width
    file_names: np.ndarray  # (I,) 'S', UTF-8
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    table: np.ndarray  # (A,) TABLE


def read_annotations(annotation_file: str, report: DataReport) -> Annotations:
    """Read and check a COCO annotation file; what breaks a rule is added to `report`.

    Entries with an error are left out. Raises UserError only for what is no COCO file at all.
    """
    coco = _read_json(annotation_file)
    image_ids, sizes, file_names = _images(coco["images"], report)
    category_ids, class_names = _categories(coco["categories"], report)
    table = _annotations(coco.get("annotations", []), image_ids, category_ids, report)
    _check_boxes(table, image_ids, sizes, report)
    return Annotations(image_ids, sizes, file_names, category_ids, class_names, table)


def _read_json(annotation_file: str) -> dict:
    remedy = "give an instances_*.json file of the COCO format"
    try:
        with open(annotation_file, "rb") as file:
            # Polygons are nine tenths of the file and unused: without them it is read 5 times as
            # fast in a third of the memory. Inside a JSON string the second quote would be escaped.
            coco = json.loads(re.sub(rb'"segmentation":\s*\[[^"{}]*\]\s*,', b"", file.read()))
    except OSError as error:
        raise UserError(f"{annotation_file}: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{annotation_file}: not a JSON file, or cut short; {remedy}") from error
    for key in ("images", "categories"):
        if type(coco) is not dict or type(coco.get(key)) is not list or not coco[key]:
            raise UserError(f'{annotation_file}: no "{key}" in it; {remedy}')
    if type(coco.get("annotations", [])) is not list:
        raise UserError(f'{annotation_file}: "annotations" is not a list; {remedy}')
    return coco


def _images(entries: list, report: DataReport) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, sizes, names = [], [], []
    for number, entry in enumerate(entries):
        ident, height, width = _integers(entry, "id", "height", "width")
        name = _text(entry, "file_name")
        if None in (ident, height, width, name):
            rule = "image without an integer id, height, width and a file_name"
            report.error(rule, f"images[{number}]")
            continue
        if not (0 < height < LIMIT and 0 < width < LIMIT):
            report.error("image size not positive", f"image {ident} {width} x {height}")
            height = width = LIMIT  # so that its boxes are not reported as well
        ids.append(ident)
        sizes.append((height, width))
        names.append(name.encode(errors="replace"))
    report.error("image id used twice", *(f"image {i}" for i in _repeated(ids)))
    sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    return np.array(ids, dtype=np.int64), sizes, np.array(names, dtype=np.bytes_)


def _categories(entries: list, report: DataReport) -> tuple[tuple[int, ...], tuple[str, ...]]:
    found = []
    for number, entry in enumerate(entries):
        (ident,), name = _integers(entry, "id"), _text(entry, "name")
        if ident is None or ident < 0 or name is None:
            report.error("category without an id of 0 or more and a name", f"categories[{number}]")
        else:
            found.append((ident, name))
    ids, names = tuple(ident for ident, _ in found), tuple(name for _, name in found)
    report.error("category id used twice", *map(str, _repeated(ids)))
    report.error("category name used twice", *map(repr, _repeated(names)))
    return ids, names


def _annotations(
    entries: list, image_ids: np.ndarray, category_ids: tuple, report: DataReport
) -> np.ndarray:
    position = {ident: i for i, ident in enumerate(image_ids.tolist())}
    label = {ident: i for i, ident in enumerate(category_ids)}
    rows = []
    for number, entry in enumerate(entries):
        ident, image, category = _integers(entry, "id", "image_id", "category_id")
        if None in (ident, image, category):
            rule = "annotation without an integer id, image_id and category_id"
            report.error(rule, f"annotations[{number}]")
            continue
        box, area = entry.get("bbox"), entry.get("area")
        flags = entry.get("iscrowd", 0), entry.get("ignore", 0)
        broken = None
        if category not in label:
            broken = f"unknown category ({category})"
        elif type(box) is not list or len(box) != 4 or not all(map(_is_number, box)):
            broken = "box that is not 4 finite numbers"
        elif area is not None and not _is_number(area, 0, LIMIT**2):
            broken = "area that is not a number of 0 or more"
        elif flags[0] not in (0, 1) or flags[1] not in (0, 1):
            broken = "iscrowd or ignore that is neither 0 nor 1"
        if broken:
            report.error(broken, f"image {image} annotation {ident}")
            continue
        if image not in position:
            report.note("unknown image, annotation skipped", f"image {image} annotation {ident}")
        where = position.get(image, -1), label[category]
        rows.append((ident, *where, box, math.nan if area is None else area, *flags, False))
    table = np.array(rows, dtype=TABLE)
    report.error(
        "annotation id used twice", *(f"annotation {i}" for i in _repeated(table["id"].tolist()))
    )
    return table


def _check_boxes(table: np.ndarray, image_ids, sizes, report: DataReport) -> None:
    """Report boxes of no area or outside their image, and mark the others as usable."""
    known = table[table["image"] >= 0]
    height, width = sizes[known["image"]].T
    x, y, w, h = known["box_xywh"].T
    negative = (w < 0) | (h < 0)
    empty = ((w == 0) | (h == 0)) & ~negative
    beyond = (x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0)
    outside = beyond & ~negative & ~empty
    usable = ~negative & ~empty & ~outside
    excess = np.max([-x, -y, x + w - width, y + h - height], axis=0)

    def found(mask: np.ndarray) -> list[str]:
        return [f"image {image_ids[a['image']]} annotation {a['id']}" for a in known[mask]]

    report.error("box of negative size", *found(negative))
    report.note("zero-size box, skipped", *found(empty))
    report.note("box wholly outside its image, skipped", *found(outside))
    report.note("box more than 1 pixel over the edge, kept", *found(usable & (excess > 1)))
    table["usable"][table["image"] >= 0] = usable


def _integers(entry, *keys: str) -> list[int | None]:
    values = [entry.get(key) for key in keys] if type(entry) is dict else [None] * len(keys)
    # Ids must survive in a float64 row of results.
    return [v if type(v) is int and -(2**53) < v < 2**53 else None for v in values]


def _text(entry, key: str) -> str | None:
    value = entry.get(key) if type(entry) is dict else None
    return value if type(value) is str and value else None


def _is_number(value, low: int = -LIMIT, high: int = LIMIT) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN fails both


def _repeated(values: list) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


def missing_images(image_dir: str, file_names: np.ndarray) -> list[str]:
    """Those of `file_names` (UTF-8) that are not in `image_dir`; each folder is listed once."""
    if not os.path.isdir(image_dir):
        raise UserError(f"{image_dir}: no such folder of images; check --data_path")
    listed: dict[str, set[str]] = {}
    missing = []
    for name in map(bytes.decode, file_names.tolist()):
        folder, base = os.path.split(name)
        if folder not in listed:
            path = os.path.join(image_dir, folder)
            listed[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        if base not in listed[folder]:
            missing.append(name)
    return missing


def check_data(annotation_file: str, image_dir: str, decode: bool = True) -> DataReport:
    """Apply every rule to an annotation file and its images, and decode them all (`decode`).

    Stops early (UserError) only for what is no COCO file or no folder.
    """
    report = DataReport()
    data = read_annotations(annotation_file, report)
    missing = missing_images(image_dir, data.file_names)
    report.error(f"image file missing in {image_dir}", *missing)
    absent = set(missing)
    images = [
        (name, tuple(size))
        for name, size in zip(np.char.decode(data.file_names), data.sizes.tolist(), strict=True)
        if decode and name not in absent
    ]

    def compare(image: tuple[str, tuple[int, int]]) -> tuple | None:
        name, annotated = image
        path = os.path.join(image_dir, name)
        try:
            decoded = read_image(path).shape[:2]
            upright = decoded if decoded == annotated else read_image(path, False).shape[:2]
        except UserError:
            return report.error, "image that cannot be decoded", name
        if decoded == annotated:
            return None
        if upright == annotated:
            return report.note, "annotated as its EXIF orientation turns it, which is ignored", name
        sizes = "{1} x {0}, annotated {3} x {2}".format(*decoded, *annotated)
        return report.error, "image of another size than annotated", f"{name}: {sizes}"

    with ThreadPool(os.cpu_count()) as pool:
        results = pool.imap(compare, images, chunksize=16)
        for finding in tqdm(results, total=len(images), unit="image", disable=None):
            if finding:
                add, rule, example = finding
                add(rule, example)
    return report


def print_report(*data: tuple[str, str]) -> int:
    """`--check_data` of annotation files with their image folders; the exit status."""
    status = 0
    for annotation_file, image_dir in data:
        report = check_data(annotation_file, image_dir)
        print(f"{annotation_file}: {len(report.errors)} errors, {len(report.notes)} notes")
        for line in report.lines(limit=None):
            print(f"  {line}")
        status |= bool(report.errors)
    return status
