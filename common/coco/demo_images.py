"""What the demos read and write: image files in, pictures of detections and results.json out."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.coco.draw import draw_boxes
from common.coco.images import read_image
from common.errors import UserError
from common.files import cannot_be_written, encoded, write_atomically

RESULTS_FILE = "results.json"


def find_images(inputs: Sequence[str | Path], show_dir: Path) -> dict[str, Path]:
    """Return the image files by their path below the folder that all have in common.

    `inputs` are files and folders. A file is taken whatever its name. Folders are walked in sorted
    order for files whose suffix is one of an image format that Pillow reads. What lies in
    `show_dir`, pictures of a former call, is left out. Raise UserError for an input without an
    image.
    """
    show_dir = Path(os.path.abspath(show_dir))
    images = []
    for name in inputs:
        images += _images_of_input(name, show_dir)
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
    boxes: Tensor, scores: Tensor, labels: Tensor, image_size: tuple[int, int], min_score: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the detections with at least `min_score`, their boxes cut at the image's border.

    boxes (n, 4) xyxy pixels, scores (n,), labels (n,); `image_size` is (height, width).
    """
    height, width = image_size
    keep = scores >= min_score
    limits = torch.tensor([width, height, width, height])
    boxes = boxes[keep].clamp(min=0).minimum(limits)
    return boxes, scores[keep], labels[keep]


class DemoOutput:
    """The pictures of detections in `show_dir`, and the list of what is drawn in them.

    Detections below `min_score` are not drawn. `len()` is the number of pictures.
    """

    def __init__(self, show_dir: Path, class_names: Sequence[str], min_score: float):
        self.show_dir = show_dir
        self.class_names = class_names
        self.min_score = min_score
        self.results: dict[str, dict] = {}

    def __len__(self) -> int:
        return len(self.results)

    def add(
        self, name: str, image: np.ndarray, boxes: Tensor, scores: Tensor, labels: Tensor
    ) -> None:
        """Draw the detections of an image (H, W, 3) uint8 and save the picture under its name.

        boxes (n, 4) xyxy pixels, scores (n,), labels (n,), on the CPU. Raise UserError where the
        picture cannot be written.
        """
        size = image.shape[:2]
        boxes, scores, labels = visible(boxes, scores, labels, size, self.min_score)
        self.results[name] = {
            "boxes": boxes.double().round(decimals=2).tolist(),
            "scores": scores.double().round(decimals=4).tolist(),
            "classes": [self.class_names[label] for label in labels],
        }
        picture = draw_boxes(image, boxes, labels, self.class_names, scores)
        path = self.show_dir / name
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
            path = path.with_name(f"{path.name}.png")  # of a format that Pillow only reads
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=95)
        except OSError as error:
            raise cannot_be_written(path, error) from None

    def write(self) -> None:
        """Write `results.json`: boxes (xyxy pixels), scores and class names of every picture.

        Nothing is written where there is no picture.
        """
        if not self.results:
            return
        text = json.dumps(self.results, indent=1, ensure_ascii=False)
        path = self.show_dir / RESULTS_FILE
        write_atomically(path, encoded(text + "\n"))
