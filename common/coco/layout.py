"""Where in a folder the annotation file and the images of a split are: COCO, Roboflow or plain."""

import os
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError


class Files(NamedTuple):
    """An annotation file and the folder of its images, in a layout with a name."""

    annotation_file: str
    image_dir: str
    layout: str

    def __str__(self) -> str:
        return f"{self.annotation_file}, images in {self.image_dir} (layout: {self.layout})"


# By layout: annotation file and image folder of a split, tried in this order. `{split}` is "train"
# or "val", `{valid}` the latter's name in Roboflow's exports.
LAYOUTS = (
    ("COCO 2017", "annotations/instances_{split}2017.json", "{split}2017"),
    ("COCO 2017, slim", "annotations/bbox_only_instances_{split}2017.json", "{split}2017"),
    ("Roboflow", "{valid}/_annotations.coco.json", "{valid}"),
    ("plain", "{split}.json", "{split}/images"),
    ("plain", "{split}.json", "{valid}/images"),
    ("plain", "{split}.json", "{split}"),
    ("plain", "{split}.json", "{valid}"),
    ("plain", "{split}.json", "images/{split}"),
    ("plain", "{split}.json", "images/{split}2017"),
    ("plain", "{split}.json", "images"),
    ("plain", "{split}.json", "JPEGImages"),
    ("plain", "annotations/{split}.json", "{split}"),
    ("plain", "annotations/{split}.json", "images/{split}"),
    ("plain", "annotations/{split}.json", "images"),
    ("plain", "annotations/instances_{split}.json", "{split}"),
    ("plain", "annotations/instances_{split}.json", "images/{split}"),
    ("plain", "annotations/instances_{split}.json", "images"),
)
# Commands of a converter, for the layouts of other annotation formats (docs/data.md).
CONVERTER = (
    "pip install globox, then, for each split, whose labels are in a folder of their own: "
    "globox convert {labels} {folder}/{split}.json "
    "--format {name} --img_folder {images} {more}--save_fmt coco --coco_auto_ids"
)
# Where the labels of a split are in those formats, tried in this order; of some the images are in a
# folder of another name beside them, else in the same one.
VOC_LABELS = ("Annotations", "VOC*/Annotations", "{valid}", "{split}")
YOLO_LABELS = (
    "{valid}/labels",
    "{split}/labels",
    "labels/{split}",
    "labels/{split}2017",
    "labels",
    "obj_{split}_data",
    "{valid}",
    "{split}",
)
IMAGES_BESIDE = {"Annotations": "JPEGImages", "labels": "images"}


def find_coco(data_path: str, split: str, annotations: str = "", images: str = "") -> Files:
    """Return the annotation file and the image folder of a split ("train" or "val").

    `annotations` and `images` name a file and a folder outright; what is not named is looked for
    in `data_path`, in the layouts known. Raise UserError for what is missing, with the command of
    a converter where the annotations have another format.
    """
    if annotations and not os.path.isfile(annotations):
        raise UserError(f"--{split}_annotations {annotations}: no such file", "give COCO's JSON")
    if images and not os.path.isdir(images):
        raise UserError(f"--{split}_images {images}: no such folder", "give that of the images")
    if annotations and images:
        return Files(annotations, images, "as named")
    folder = data_path or "."
    for layout, file_name, folder_name in LAYOUTS:
        file = annotations or _in(folder, file_name, split)
        image_dir = images or _in(folder, folder_name, split)
        if os.path.isfile(file) and os.path.isdir(image_dir):
            return Files(file, image_dir, layout)
    raise _missing(folder, split, annotations, images)


def _in(folder: str, name: str, split: str) -> str:
    valid = "valid" if split == "val" else split
    return os.path.join(folder, name.format(split=split, valid=valid))


def _missing(folder: str, split: str, annotations: str, images: str) -> UserError:
    """Return the error for a split that is not there, with the remedy that fits the folder."""
    flag = f"--data_path {folder}"
    if not os.path.isdir(folder):
        return UserError(f"{flag}: no such folder", "bash download_dataset.sh fetches COCO")
    if annotations:
        return UserError(
            f"--{split}_annotations {annotations}: the folder of its images is not in {folder}",
            f"name it with --{split}_images",
        )
    if images:
        return UserError(
            f"--{split}_images {images}: the annotation file is not in {folder}",
            f"name it with --{split}_annotations",
        )
    other_format = _other_format(Path(folder), split)
    if other_format is not None:
        return other_format
    layout, file_name, folder_name = _closest_layout(folder, split)
    absent = []
    if not os.path.isfile(_in(folder, file_name, split)):
        absent.append(f"file {_in(folder, file_name, split)}")
    if not os.path.isdir(_in(folder, folder_name, split)):
        absent.append(f"folder {_in(folder, folder_name, split)}")
    remedy = f"name both with --{split}_annotations and --{split}_images"
    if layout == LAYOUTS[0][0]:
        remedy += ", or fetch COCO with bash download_dataset.sh"
    return UserError(f"{flag}: no {' and no '.join(absent)} (layout: {layout})", remedy)


def _closest_layout(folder: str, split: str) -> tuple[str, str, str]:
    """Return the layout that a folder without a split has most of.

    That is one whose annotation file is there, else one that the other split has, else COCO's.
    """
    for layout in LAYOUTS:
        if os.path.isfile(_in(folder, layout[1], split)):
            return layout
    other_split = "val" if split == "train" else "train"
    for layout in LAYOUTS:
        has_file = os.path.isfile(_in(folder, layout[1], other_split))
        if has_file and os.path.isdir(_in(folder, layout[2], other_split)):
            return layout
    return LAYOUTS[0]


def _other_format(folder: Path, split: str) -> UserError | None:
    """Return the error for a folder of VOC or YOLO annotations, None where it holds neither."""
    labels = _first_with(folder, VOC_LABELS, split, "*.xml")
    if labels is not None:
        remedy = CONVERTER.format(
            folder=folder,
            labels=labels,
            split=split,
            name="pascalvoc",
            images=_images_of(labels, folder),
            more="",
        )
        return UserError(f"--data_path {folder}: its annotations are VOC's XML", remedy)
    labels = _first_with(folder, YOLO_LABELS, split, "*.txt")
    if labels is None:
        if not (folder / "data.yaml").is_file():
            return None
        labels = folder / split / "labels"
    remedy = CONVERTER.format(
        folder=folder,
        labels=labels,
        split=split,
        name="yolov5",
        images=_images_of(labels, folder),
        more="--mapping NAMES.txt (the class names, a line each) ",
    )
    return UserError(f"--data_path {folder}: its annotations are YOLO's text files", remedy)


def _first_with(folder: Path, places: tuple[str, ...], split: str, pattern: str) -> Path | None:
    """Return the first of some places in a folder that holds a file of a pattern."""
    for place in places:
        for found in sorted(folder.glob(_in("", place, split))):
            if any(found.glob(pattern)):
                return found
    return None


def _images_of(labels: Path, folder: Path) -> Path:
    """Return the folder of the images that belong to a folder of labels."""
    parts = [IMAGES_BESIDE.get(part, part) for part in labels.relative_to(folder).parts]
    return folder.joinpath(*parts)
