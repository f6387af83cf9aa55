"""The annotation index: a COCO file as flat arrays, checked once, when it is opened."""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError

# The 80 in the order of their category ids, for weights that bring none.
COCO_CLASSES = (*Path(__file__).with_name("class_names.txt").read_text().splitlines(),)
# Polygons are nine tenths of the file and unused: without them it is read 5 times as fast, in a
# third of the memory. A key must follow; inside a JSON string the second quote would be escaped.
POLYGONS = re.compile(rb'"segmentation":\s*\[[^"{}]*\]\s*,(?=\s*")')
FIELDS = "id, image_id, label, box_xywh, area, crowd, ignore, usable"
FORMATS = "i8, i8, i8, 4f8, f8, ?, ?, ?"


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """I images in file order and their A annotations, sorted by image.

    The table's label is a position in class_names, box_xywh in pixels, area NaN where the file has
    none, usable a box of positive area inside its image. Flat arrays only: a forked worker reads
    them without touching a reference count, so the memory stays shared.
    """

    annotation_file: str
    image_dir: str
    image_ids: np.ndarray  # (I,) int64
    sizes: np.ndarray  # (I, 2) int32 height, width
    file_names: np.ndarray  # (I,) 'S', UTF-8
    offsets: np.ndarray  # (I + 1,) int64: the rows of image i are offsets[i]:offsets[i + 1]
    table: np.recarray  # (A,) of FIELDS
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # of each class; -1 for one that the file does not have
    report: dict[str, list[str]]  # rule -> what breaks it; an "error: " stops the run

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, i: int) -> str:
        return os.path.join(self.image_dir, self.file_names[i].decode())

    def annotations(self, i: int) -> np.recarray:
        """The rows of image `i` in the table, in file order."""
        return self.table[self.offsets[i] : self.offsets[i + 1]]

    def subset(self, keep: np.ndarray) -> "CocoIndex":
        """The images that `keep` (boolean mask, or positions in any order) names."""
        by_image = {key: getattr(self, key)[keep] for key in ("image_ids", "sizes", "file_names")}
        counts = np.diff(self.offsets)[keep]
        offsets = np.append(0, np.cumsum(counts))
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][keep] - offsets[:-1], counts)
        return replace(self, **by_image, offsets=offsets, table=self.table[rows])

    def max_boxes(self) -> int:
        """The largest number of annotations of one image, rounded up to a positive 16."""
        return -(-int(np.diff(self.offsets).max(initial=1)) // 16) * 16

    def compare(self, names: tuple[str, ...]) -> None:
        """Report the classes that are not among `names`."""
        rule = f"error: category not among the {len(names)} classes trained on"
        self.report[rule] = [repr(name) for name in self.class_names if name not in names]

    def lines(self, limit: int | None = 5) -> list[str]:
        """One line for each broken rule, with its count and up to `limit` examples."""
        found = {rule: examples for rule, examples in self.report.items() if examples}
        return [f"{rule}: {len(all_)} ({'; '.join(all_[:limit])})" for rule, all_ in found.items()]

    def raise_errors(self) -> None:
        """Raise all errors of the report together as one UserError, if there are any."""
        errors = "; ".join(line[7:] for line in self.lines(3) if line.startswith("error: "))
        if errors:
            hint = "train.py --check_data lists them in full"
            raise UserError(f"{self.annotation_file}: {errors}; {hint}")


def read_index(annotation_file: str, image_dir: str, classes: tuple | None = None) -> CocoIndex:
    """Read and check a COCO annotation file (full or slim); the index of its usable annotations.

    `classes`: the class names of a checkpoint; labels then count in their order. Raises one
    UserError with all errors, files missing in `image_dir` among them.
    """
    index = read_annotations(annotation_file, image_dir)
    index.compare(names := tuple(classes or index.class_names))
    places = [os.path.split(index.path(i)) for i in range(len(index))]
    folders = {folder for folder, _ in places if os.path.isdir(folder)}
    present = {(folder, name) for folder in folders for name in os.listdir(folder)}
    missing = [os.path.join(*place) for place in places if place not in present]
    index.report["error: image file missing"] = missing
    index.raise_errors()

    table = index.table[index.table.usable]
    table.label = np.array([names.index(name) for name in index.class_names])[table.label]
    offsets = np.append(0, np.cumsum(index.table.usable))[index.offsets]
    ids = dict(zip(index.class_names, index.category_ids, strict=True))
    by_class = {"class_names": names, "category_ids": tuple(ids.get(name, -1) for name in names)}
    return replace(index, table=table, offsets=offsets, **by_class)


@np.errstate(invalid="ignore")  # of numbers that the report has as errors
def read_annotations(annotation_file: str, image_dir: str = "") -> CocoIndex:
    """Read a COCO annotation file: all annotations of its images, and a report on them.

    Arrays of a file with errors mean nothing. Raises UserError only for what is no COCO file.
    """
    images, categories, annotations = _read_json(annotation_file)
    [image_ids], sizes = np.split(_columns(images, "id", "height", "width"), [1])
    file_names = [str(image.get("file_name", "")).encode(errors="replace") for image in images]
    (category_ids,) = _columns(categories, "id")
    names = [str(category.get("name", "")) for category in categories]
    keys = ("id", "image_id", "category_id", "area", "iscrowd", "ignore")
    ids, of_image, of_category, area, *flags = _columns(annotations, *keys)
    flags = np.nan_to_num(flags)
    boxes = _columns(map(_box, annotations), *"xywh")
    image, label = _places(of_image, image_ids), _places(of_category, category_ids)
    start, extent, size = boxes[:2], boxes[2:], sizes[::-1, image]
    end = start + extent
    report: dict[str, list[str]] = {}
    bad_name = [name in ("", *names[:i]) for i, name in enumerate(names)]
    rule = "error: image id or size unusable, or id repeated"
    _apply({rule: [_unsound(image_ids), *~((sizes > 0) & (sizes < 2**31))]}, images, report)
    rule = "error: category id or name unusable or repeated"
    _apply({rule: _unsound(category_ids) | bad_name}, categories, report)
    rules = {
        "error: annotation id unusable or repeated": _unsound(ids),
        "error: unknown category": label < 0,
        "error: box that is not 4 finite numbers": ~np.isfinite(boxes),
        "error: box of negative size": extent < 0,
        "error: area, iscrowd or ignore out of range": [area < 0, *~np.isin(flags, (0, 1))],
        "note: unknown image, annotation skipped": image < 0,
        "note: zero-size box, skipped": extent == 0,
        "note: box wholly outside its image, skipped": (start >= size) | (end <= 0),
        "note: box more than 1 pixel over the edge, kept": (start < -1) | (end > size + 1),
    }
    usable = _apply(rules, annotations, report)
    columns = [ids, of_image, label, boxes.T, area, *flags, usable]
    order = np.argsort(image, kind="stable")[np.count_nonzero(image < 0) :]
    return CocoIndex(
        annotation_file=str(annotation_file),
        image_dir=str(image_dir),
        image_ids=image_ids.astype(np.int64),
        sizes=sizes.T.astype(np.int32),
        file_names=np.array(file_names),
        offsets=np.searchsorted(image[order], np.arange(len(images) + 1)),
        table=np.rec.fromarrays(columns, formats=FORMATS, names=FIELDS)[order],
        class_names=tuple(names),
        category_ids=tuple(category_ids.astype(np.int64).tolist()),
        report=report,
    )


def _read_json(annotation_file: str) -> list[list[dict]]:
    try:
        with open(annotation_file, "rb") as file:
            coco = json.loads(POLYGONS.sub(b"", file.read()))
        lists = [coco["images"], coco["categories"], coco.get("annotations", [])]
        if not (lists[0] and lists[1] and all(type(entries) is list for entries in lists)):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", "no images and categories in JSON, or cut short")
        raise UserError(f"{annotation_file}: {reason}; give an instances_*.json file") from error
    return [[entry if type(entry) is dict else {} for entry in entries] for entries in lists]


def _box(annotation: dict) -> dict:
    box = annotation.get("bbox")
    return dict(zip("xywh", box, strict=True)) if type(box) is list and len(box) == 4 else {}


def _columns(entries: list[dict] | map, *keys: str) -> np.ndarray:
    """The numbers of n entries, (keys, n) float64; NaN where absent, -inf for what is none."""
    plain, values = {int, float, bool}, (entry.get(k, np.nan) for entry in entries for k in keys)
    values = (v if type(v) in plain and not abs(v) >= 2**53 else -np.inf for v in values)
    return np.fromiter(values, np.float64).reshape(-1, len(keys)).T


def _unsound(ids: np.ndarray) -> np.ndarray:
    """True where an id is no whole number from 0 on, or comes again."""
    return (_places(ids, ids) != np.arange(len(ids))) | ~((ids >= 0) & (ids % 1 == 0))


def _places(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The position of each of `ids` among the `known`, -1 for a stranger."""
    position = {ident: i for i, ident in enumerate(known.tolist())}
    return np.array([position.get(ident, -1) for ident in ids.tolist()], dtype=np.int64)


def _apply(rules: dict, entries: list[dict], report: dict[str, list[str]]) -> np.ndarray:
    """Report each of n entries by the first of the rules, (n,) or (k, n) bool, that it breaks."""
    usable = np.ones(len(entries), dtype=bool)
    for rule, mask in rules.items():
        broken = np.atleast_2d(mask).any(axis=0) & usable
        report[rule] = [_name(entries[i], i) for i in np.flatnonzero(broken)]
        usable &= ~broken | rule.endswith("kept")
    return usable


def _name(entry: dict, number: int) -> str:
    image, own, category = map(entry.get, ("image_id", "id", "category_id"))
    annotation = f"image {image!r} annotation {own!r} category {category!r}"
    return annotation if "image_id" in entry else f"entry {number} with id {own!r}"


def find_coco(data_path: str, split: str, annotations="", images="") -> tuple[str, str]:
    """The annotation file and image folder of `split` ("train", "val") of COCO 2017 in `data_path`.

    `annotations` and `images`, where given, override. Raises UserError for what is missing.
    """
    folder = data_path or "."
    names = (f"{prefix}instances_{split}2017.json" for prefix in ("", "bbox_only_"))
    files = [annotations] if annotations else [f"{folder}/annotations/{name}" for name in names]
    image_dir = images or os.path.join(folder, f"{split}2017")
    found = [file for file in files if os.path.isfile(file)]
    if not found or not os.path.isdir(image_dir):
        needed = f"{' or '.join(files)}, and the folder {image_dir}"
        raise UserError(f"--data_path {folder}: needs {needed}; download_dataset.sh fetches it")
    return found[0], image_dir
