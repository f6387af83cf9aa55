"""The annotation index: a COCO file as flat arrays, as the loaders and the evaluation read it."""

import os
from dataclasses import dataclass, replace

import numpy as np

from common.coco.check import DataReport, missing_images, read_annotations
from common.npu.errors import UserError


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """I images and their A annotations, sorted by image.

    Flat arrays only: a forked worker reads them without touching a reference count, so the
    memory stays shared.
    """

    image_dir: str
    annotation_file: str
    image_ids: np.ndarray  # (I,) int64
    sizes: np.ndarray  # (I, 2) int32 height, width
    file_names: np.ndarray  # (I,) 'S', UTF-8
    offsets: np.ndarray  # (I + 1,) int64: those of image i are offsets[i]:offsets[i + 1]
    boxes_xywh: np.ndarray  # (A, 4) float64 pixels, as in the file
    labels: np.ndarray  # (A,) int64 position in class_names
    crowd: np.ndarray  # (A,) bool
    areas: np.ndarray  # (A,) float64, NaN where the file has none
    ignore: np.ndarray  # (A,) bool
    annotation_ids: np.ndarray  # (A,) int64
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # of each class; -1 for one that the file does not have

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, i: int) -> str:
        return os.path.join(self.image_dir, self.file_names[i].decode())

    def annotations(self, i: int) -> slice:
        """The rows of image `i` in the annotation arrays, in file order."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def subset(self, keep: np.ndarray) -> "CocoIndex":
        """The images that `keep` (boolean mask, or positions in any order) names."""
        keep = np.asarray(keep)
        images = np.arange(len(self))[keep if keep.dtype == bool else keep.astype(np.int64)]
        counts = np.diff(self.offsets)[images]
        offsets = np.append(0, np.cumsum(counts))
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[images] - offsets[:-1], counts)
        by_image = {name: getattr(self, name)[images] for name in BY_IMAGE}
        by_annotation = {name: getattr(self, name)[rows] for name in BY_ANNOTATION}
        return replace(self, offsets=offsets, **by_image, **by_annotation)

    def max_boxes(self, multiple: int = 16) -> int:
        """The largest number of annotations of one image, rounded up to a positive `multiple`."""
        most = int(np.diff(self.offsets).max(initial=1))
        return -(-most // multiple) * multiple


BY_IMAGE = ("image_ids", "sizes", "file_names")
BY_ANNOTATION = ("boxes_xywh", "labels", "crowd", "areas", "ignore", "annotation_ids")


def read_index(
    annotation_file: str,
    image_dir: str,
    *,
    classes: tuple[str, ...] | None = None,
    report: DataReport | None = None,
    need_images: bool = True,
) -> CocoIndex:
    """Read a COCO annotation file (full or slim), check it and its images, and index it.

    `classes`: the class names of a checkpoint; labels then count in their order. `report` is
    filled with what was found. Raises one UserError with all errors.
    """
    report = DataReport() if report is None else report
    data = read_annotations(annotation_file, report)
    if need_images:
        missing_images(image_dir, data.file_names, report)
    names = data.class_names if classes is None else tuple(classes)
    label = {name: i for i, name in enumerate(names)}
    foreign = [repr(name) for name in data.class_names if name not in label]
    report.error(f"category that is not among the {len(names)} classes of the checkpoint", *foreign)
    report.raise_errors(annotation_file)

    table = data.table[data.table["usable"]]
    table = table[np.argsort(table["image"], kind="stable")]
    counts = np.bincount(table["image"], minlength=len(data.image_ids))
    labels = np.array([label[name] for name in data.class_names])
    category_ids = dict(zip(data.class_names, data.category_ids, strict=True))
    return CocoIndex(
        image_dir=str(image_dir),
        annotation_file=str(annotation_file),
        image_ids=data.image_ids,
        sizes=data.sizes,
        file_names=data.file_names,
        offsets=np.append(0, np.cumsum(counts)),
        boxes_xywh=table["box_xywh"].copy(),
        labels=labels[table["category"]],
        crowd=table["crowd"].copy(),
        areas=table["area"].copy(),
        ignore=table["ignore"].copy(),
        annotation_ids=table["id"].copy(),
        class_names=names,
        category_ids=tuple(category_ids.get(name, -1) for name in names),
    )


def find_coco(
    data_path: str | None,
    split: str,
    *,
    annotations: str | None = None,
    images: str | None = None,
) -> tuple[str, str]:
    """The annotation file and image folder of `split` ("train", "val") of COCO 2017 in `data_path`.

    `annotations` and `images`, where given, override. Raises UserError naming what is missing.
    """
    folder = str(data_path) if data_path else "."
    usual, slim = (
        os.path.join(folder, "annotations", f"{prefix}instances_{split}2017.json")
        for prefix in ("", "bbox_only_")
    )
    slim_only = os.path.isfile(slim) and not os.path.isfile(usual)
    annotation_file = str(annotations or (slim if slim_only else usual))
    image_dir = str(images or os.path.join(folder, f"{split}2017"))
    looked_for = [annotation_file] if annotations else [usual, slim]
    missing = [] if os.path.isfile(annotation_file) else looked_for
    missing = missing if os.path.isdir(image_dir) else [*missing, image_dir]
    if missing:
        raise UserError(
            f"--data_path {folder}: looked in vain for {', '.join(missing)}; "
            "bash download_dataset.sh DIR fetches COCO 2017 (with --sample DIR: a small sample set)"
        )
    return annotation_file, image_dir
