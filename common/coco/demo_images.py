"""What the demos read and write: images and videos in, pictures, videos and results.json out."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.coco.detections import Detections
from common.coco.draw import draw_boxes
from common.coco.evaluation import save_results, to_result_rows
from common.coco.images import read_image
from common.coco.index import COCO_CATEGORY_IDS, COCO_CLASSES
from common.coco.video import FrameName, VideoWriter, is_video
from common.errors import UserError
from common.files import cannot_be_written, encoded, write_atomically

RESULTS_FILE = "results.json"
COCO_RESULTS_FILE = "results.bbox.json"


def find_images(inputs: Sequence[str | Path], show_dir: Path) -> dict[str, Path]:
    """Return the image files by their path below the folder that all have in common.

    `inputs` are files and folders, of which videos are left out here. Any other file is taken,
    whatever its name. Folders are walked in sorted order for files whose suffix is one of an image
    format that Pillow reads. What lies in `show_dir`, pictures of a former call, is left out. Raise
    UserError for an input without an image.
    """
    show_dir = Path(os.path.abspath(show_dir))
    images = []
    for name in inputs:
        if not is_video(name):
            images += _images_of_input(name, show_dir)
    if not images:
        return {}
    root = os.path.commonpath([image.parent for image in images])
    return {image.relative_to(root).as_posix(): image for image in images}


def _images_of_input(name: str | Path, show_dir: Path) -> list[Path]:
    path = Path(os.path.abspath(name))
    if not path.exists():
        raise UserError(f"{name} does not exist; give images or folders of images")
    images = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        images = [file for file in files if is_image(file)]
        if not images:
            raise UserError(
                f"{name}: none of its {len(files)} files has the suffix of an image format that "
                "Pillow reads",
                "give another folder, or such files by their names",
            )
        if len(images) < len(files):
            print(f"{name}: {len(files) - len(images)} files are no images", file=sys.stderr)
    images = [image for image in images if show_dir not in image.parents]
    if not images:
        raise UserError(f"{name}: lies in --show_dir; give other images or another folder")
    return images


def is_image(path: Path) -> bool:
    """Return whether a file's suffix is one of an image format that Pillow reads."""
    image_format = Image.registered_extensions().get(path.suffix.lower())
    return image_format in Image.OPEN


def read_images(
    files: dict[str, Path], batch_size: int
) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Yield names and images (H, W, 3) uint8 RGB of up to `batch_size` files at a time.

    The images are upright, as their EXIF orientation asks. A file that cannot be read is reported
    on stderr and left out. On a terminal a progress bar is shown.
    """
    names = []
    images = []
    hide_bar = not sys.stderr.isatty()
    for name, path in tqdm(files.items(), "detecting", leave=False, disable=hide_bar):
        try:
            image = read_image(path, ignore_exif=False)
        except UserError as error:
            # Without the remedy, which is about data sets.
            tqdm.write(f"skipped: {error.problem}", file=sys.stderr)
            continue
        names.append(name)
        images.append(image)
        if len(images) == batch_size:
            yield names, images
            names = []
            images = []
    if images:
        yield names, images


def visible(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_size: tuple[int, int],
    min_score: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the detections with at least `min_score`, their boxes cut at the image's border.

    boxes (n, 4) xyxy pixels, scores (n,), labels (n,); `image_size` is (height, width); the
    lowest score is one for all or one for each detection (n,).
    """
    height, width = image_size
    keep = scores >= min_score
    limits = torch.tensor([width, height, width, height])
    boxes = boxes[keep].clamp(min=0).minimum(limits)
    return boxes, scores[keep], labels[keep]


def category_ids_of(state: Mapping, class_names: Sequence[str]) -> tuple[int, ...]:
    """Return the category ids of a checkpoint's classes: its own, COCO's, or 1 and up."""
    if "category_ids" in state:
        return tuple(state["category_ids"])
    if tuple(class_names) == COCO_CLASSES:
        return COCO_CATEGORY_IDS
    return tuple(range(1, len(class_names) + 1))


class DemoOutput:
    """The pictures and videos of detections in `show_dir`, and the list of what is drawn in them.

    Detections below `min_score`, a number or one for each class, are not drawn. `len()` is the
    number of images and frames. As a context it closes the videos at its end, also after an error.
    """

    def __init__(
        self, show_dir: Path, class_names: Sequence[str], min_score: float | Sequence[float]
    ):
        self.show_dir = show_dir
        self.class_names = class_names
        self.min_scores = torch.tensor(min_score).expand(len(class_names))
        self.num_frames = 0
        self.results: dict[str, dict] = {}
        self.detections: list[tuple[Tensor, Tensor, Tensor]] = []
        self.videos: dict[str, VideoWriter] = {}

    def __len__(self) -> int:
        return len(self.results)

    def __enter__(self) -> "DemoOutput":
        return self

    def __exit__(self, *reason: object) -> None:
        for video in self.videos.values():
            video.close()

    def add(self, name: str | FrameName, image: np.ndarray, detections: Detections) -> None:
        """Draw the detections of an image (H, W, 3) uint8, as a picture or a frame of a video.

        A picture is saved under its name. Raise UserError where it cannot be written.
        """
        self.detections.append(tuple(detections))
        size = image.shape[:2]
        boxes, scores, labels = visible(*detections, size, self.min_scores[detections.labels])
        self.results[str(name)] = {
            "boxes": boxes.double().round(decimals=2).tolist(),
            "scores": scores.double().round(decimals=4).tolist(),
            "classes": [self.class_names[label] for label in labels],
        }
        picture = draw_boxes(image, boxes, labels, self.class_names, scores)
        if isinstance(name, FrameName):
            self._append(name, np.asarray(picture))
            self.num_frames += 1
        else:
            self._save(name, picture)

    def _append(self, name: FrameName, picture: np.ndarray) -> None:
        if name.video not in self.videos:
            height, width = picture.shape[:2]
            path = self.show_dir / name.video
            self.videos[name.video] = VideoWriter(path, name.rate, width, height)
        self.videos[name.video].write(picture)

    def _save(self, name: str, picture: Image.Image) -> None:
        path = self.show_dir / name
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
            path = path.with_name(f"{path.name}.png")  # of a format that Pillow only reads
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=95)
        except OSError as error:
            raise cannot_be_written(path, error) from None

    def boxes_line(self) -> str:
        """Return how many boxes were drawn, or what keeps all of them from being drawn."""
        count = sum(len(result["boxes"]) for result in self.results.values())
        if count:
            return f"boxes: {count}"
        highest = [float(scores.max()) for _, scores, _ in self.detections if len(scores)]
        if not highest:
            return "boxes: none is detected"
        return f"boxes: none, the highest score is {max(highest):.3f}; lower --min_score"

    def write(self, category_ids: Sequence[int] | None = None) -> None:
        """Write `results.json`: boxes (xyxy pixels), scores and class names, a line each image.

        With `category_ids`, those of the labels, all detections are also written in COCO's format
        for results. An image's id is the number that is its file's name; where some have none,
        all are numbered from 1. Nothing is written where there is no image.
        """
        if not self.results:
            return
        lines = []
        for name, result in self.results.items():
            key = json.dumps(name, ensure_ascii=False)
            lines.append(f"{key}: {json.dumps(result, ensure_ascii=False)}")
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        write_atomically(self.show_dir / RESULTS_FILE, encoded(text))
        if category_ids is None:
            return
        rows = []
        ids = image_ids(self.results)
        for image_id, of_image in zip(ids, self.detections, strict=True):
            rows.append(to_result_rows(image_id, *of_image, category_ids))
        save_results(self.show_dir / COCO_RESULTS_FILE, np.concatenate(rows))


def image_ids(names: Iterable[str]) -> list[int]:
    """Return the numbers that the names of files are, or 1 and up where some are none."""
    stems = [Path(name).stem for name in names]
    if all(stem.isdecimal() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(stems) + 1))
