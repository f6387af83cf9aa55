"""The rules at the door: a COCO annotation file is checked once, when it is opened.

An error stops the run; a note is told and the run goes on (such annotations are skipped where the
rule says so). `check_data` (`--check_data`) also decodes every image and lists all that it finds.
"""

import functools
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
NEEDED = {  # integers and texts that no entry can do without
    "images": (("id", "height", "width"), ("file_name",)),
    "categories": (("id",), ("name",)),
    "annotations": (("id", "image_id", "category_id"), ()),
}


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
            count = f"{len(self.errors)} problem{'s' * (len(self.errors) > 1)}"
            remedy = "run with --check_data for the full list"
            raise UserError(f"{annotation_file}: {count}: {problems}; {remedy}")


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
    images = _entries(coco, "images", report)
    image_ids = [image["id"] for image in images]
    sizes = np.array([(i["height"], i["width"]) for i in images], dtype=np.int64).reshape(-1, 2)
    wrong = ((sizes <= 0) | (sizes >= LIMIT)).any(axis=1)
    for i in np.flatnonzero(wrong):
        example = f"image {image_ids[i]} {sizes[i, 1]} x {sizes[i, 0]}"
        report.error("image size not positive", example)
    sizes[wrong] = LIMIT  # so that their boxes are not reported as well
    categories = _entries(coco, "categories", report)
    category_ids = [category["id"] for category in categories]
    class_names = [category["name"] for category in categories]
    table = _table(_entries(coco, "annotations", report), image_ids, category_ids, report)
    _check_boxes(table, image_ids, sizes, report)
    for what, values in (
        ("image id", image_ids),
        ("category id", category_ids),
        ("category name", class_names),
        ("annotation id", table["id"].tolist()),
    ):
        twice = (repr(value) for value, count in Counter(values).items() if count > 1)
        report.error(f"{what} used twice", *twice)
    return Annotations(
        np.array(image_ids, dtype=np.int64),
        sizes.astype(np.int32),
        np.array([i["file_name"].encode(errors="replace") for i in images], dtype=np.bytes_),
        tuple(category_ids),
        tuple(class_names),
        table,
    )


def _read_json(annotation_file: str) -> dict[str, list]:
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
    coco = {"annotations": [], **coco} if type(coco) is dict else {}
    for key in NEEDED:
        if type(coco.get(key)) is not list or not (coco[key] or key == "annotations"):
            raise UserError(f'{annotation_file}: no "{key}" list in it; {remedy}')
    return coco


def _entries(coco: dict[str, list], key: str, report: DataReport) -> list[dict]:
    """The entries of the list `key` that have what is NEEDED; the others are reported."""
    integers, texts = NEEDED[key]
    rule = f"{key} without a usable {', '.join(integers + texts)}"
    whole = []
    for number, entry in enumerate(coco[key]):
        if (
            type(entry) is dict
            # Ids must survive in a float64 row of results.
            and all(type(v) is int and 0 <= v < 2**53 for v in map(entry.get, integers))
            and all(type(v) is str and v for v in map(entry.get, texts))
        ):
            whole.append(entry)
        else:
            report.error(rule, f"{key}[{number}]")
    return whole


def _table(
    entries: list[dict], image_ids: list[int], category_ids: list[int], report: DataReport
) -> np.ndarray:
    image_at = {ident: i for i, ident in enumerate(image_ids)}
    category_at = {ident: i for i, ident in enumerate(category_ids)}
    rows = []
    for entry in entries:
        ident, image, category = entry["id"], entry["image_id"], entry["category_id"]
        box, area = entry.get("bbox"), entry.get("area")
        flags = entry.get("iscrowd", 0), entry.get("ignore", 0)
        broken = None
        if category not in category_at:
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
        if image not in image_at:
            report.note("unknown image, annotation skipped", f"image {image} annotation {ident}")
        place = image_at.get(image, -1), category_at[category]
        rows.append((ident, *place, box, math.nan if area is None else area, *flags, False))
    return np.array(rows, dtype=TABLE)


def _is_number(value, low: int = -LIMIT, high: int = LIMIT) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN fails both


def _check_boxes(
    table: np.ndarray, image_ids: list[int], sizes: np.ndarray, report: DataReport
) -> None:
    """Report boxes of no area or outside their image, and mark the others as usable."""
    known = table[table["image"] >= 0]
    height, width = sizes[known["image"]].T
    x, y, w, h = known["box_xywh"].T
    negative = (w < 0) | (h < 0)
    empty = ((w == 0) | (h == 0)) & ~negative
    excess = np.max([-x, -y, x + w - width, y + h - height], axis=0)
    outside = (x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0)
    usable = ~(negative | empty | outside)

    def found(mask: np.ndarray) -> list[str]:
        return [f"image {image_ids[a['image']]} annotation {a['id']}" for a in known[mask]]

    report.error("box of negative size", *found(negative))
    report.note("zero-size box, skipped", *found(empty))
    report.note("box wholly outside its image, skipped", *found(outside & ~negative & ~empty))
    report.note("box more than 1 pixel over the edge, kept", *found(usable & (excess > 1)))
    table["usable"][table["image"] >= 0] = usable


def missing_images(image_dir: str, file_names: np.ndarray, report: DataReport) -> list[str]:
    """Report those of `file_names` (UTF-8) that are not in `image_dir`, and return them."""
    if not os.path.isdir(image_dir):
        raise UserError(f"{image_dir}: no such folder of images; check --data_path")

    @functools.cache  # one listing instead of a look at each file
    def listing(folder: str) -> set[str]:
        path = os.path.join(image_dir, folder)
        return set(os.listdir(path)) if os.path.isdir(path) else set()

    names = map(os.path.split, map(bytes.decode, file_names.tolist()))
    missing = [os.path.join(folder, base) for folder, base in names if base not in listing(folder)]
    report.error(f"image file missing in {image_dir}", *missing)
    return missing


def check_data(annotation_file: str, image_dir: str, decode: bool = True) -> DataReport:
    """Apply every rule to an annotation file and its images, and decode them all (`decode`).

    Stops early (UserError) only for what is no COCO file or no folder.
    """
    report = DataReport()
    data = read_annotations(annotation_file, report)
    absent = set(missing_images(image_dir, data.file_names, report))
    images = [
        (name.decode(), (width, height))
        for name, (height, width) in zip(data.file_names, data.sizes.tolist(), strict=True)
        if decode and name.decode() not in absent
    ]

    def size(name: str, ignore_exif: bool = True) -> tuple[int, int] | None:
        try:
            height, width, _ = read_image(os.path.join(image_dir, name), ignore_exif).shape
        except UserError:
            return None
        return width, height

    with ThreadPool(os.cpu_count()) as pool:
        sizes = pool.imap(size, [name for name, _ in images], chunksize=16)
        bar = tqdm(sizes, total=len(images), unit="image", disable=None)
        for (name, annotated), decoded in zip(images, bar, strict=True):
            if decoded is None:
                report.error("image that cannot be decoded", name)
            elif decoded != annotated and size(name, ignore_exif=False) == annotated:
                report.note("annotated as its EXIF orientation turns it, which is ignored", name)
            elif decoded != annotated:
                example = "{} x {}, annotated {} x {}".format(*decoded, *annotated)
                report.error("image of another size than annotated", f"{name}: {example}")
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
