"""The built-in sample: a small COCO-format data set of drawn shapes, for runs without a download.

    python3 -m common.coco.sample DIR [--train N] [--val N]

Four classes that differ in geometry only, on textured backgrounds, with occlusion, cut-off and
tiny shapes, crowd regions and images without objects. Every image has a random stream that
depends on (seed, split, position): a larger set begins with the images of a smaller one.
"""

import common.npu.interpreter  # noqa: F401 before numpy

# isort: split

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from common.errors import UserError

# Ids with gaps, as COCO's own: whoever takes an id for a label fails on this set as well.
CATEGORIES = {"disc": 1, "box": 3, "triangle": 4, "star": 9}
# Corners of each outline, and the radius of every second one relative to the others.
OUTLINES = {"disc": (64, 1), "box": (4, 1), "triangle": (3, 1), "star": (10, 0.42)}
FIRST_ID = {"train": 1, "val": 500_001}
SIDES = (240, 400)  # pixels: the range of an image's height and width
OBJECTS_PER_IMAGE = (0.20, 0.26, 0.22, 0.14, 0.08, 0.05, 0.03, 0.02)  # of 1, 2, ... 8 objects
# One image in so many has no object, one in so many a crowd: those at these positions.
EMPTY_EVERY = 30
EMPTY_POSITION = 14
CROWD_EVERY = 20
CROWD_POSITION = 9
CROWD_SIZE = 16
TRIES = 30  # to find a position that leaves half of every object in sight
OVERSAMPLING = 4  # masks are drawn larger and reduced, for soft edges


class DrawnObject(NamedTuple):
    """An object in a picture."""

    category: str
    area: int  # pixels that it covers, hidden ones included
    visible: np.ndarray  # (H, W) bool: where it is seen


def write_sample(folder: str | Path, train: int = 240, val: int = 60, seed: int = 0) -> None:
    """Draw the set: `{train,val}2017/*.jpg` and `annotations/instances_{train,val}2017.json`.

    `train` and `val` are numbers of images. The folder appears complete or not at all. Raise
    UserError where it exists and is not empty.
    """
    folder = Path(folder).resolve()
    if min(train, val) < 1 or max(train, val) >= FIRST_ID["val"] or seed < 0:
        raise UserError(f"{train} + {val} images, seed {seed}: give counts from 1, a seed from 0")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        unfinished = Path(scratch, "set")
        (unfinished / "annotations").mkdir(parents=True)
        _write_split(unfinished, "train", train, seed)
        _write_split(unfinished, "val", val, seed)
        unfinished.replace(folder)


def _write_split(root: Path, split: str, count: int, seed: int) -> None:
    image_dir = root / f"{split}2017"
    image_dir.mkdir()
    images = []
    annotations = []
    for position in range(count):
        picture, objects = draw_picture(split, position, seed)
        image_id = FIRST_ID[split] + position
        file_name = f"{image_id:012d}.jpg"
        picture.save(image_dir / file_name, quality=90)
        images.append(
            {
                "id": image_id,
                "file_name": file_name,
                "width": picture.width,
                "height": picture.height,
            }
        )
        for number, drawn in enumerate(objects):
            left, top, right, bottom = Image.fromarray(drawn.visible).getbbox()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "area": int(drawn.visible.sum()),
                    "category_id": CATEGORIES[drawn.category],
                    "iscrowd": int(has_crowd(position) and number == 0),
                    "bbox": [left, top, right - left, bottom - top],
                }
            )
    categories = [{"id": category_id, "name": name} for name, category_id in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


def has_crowd(position: int) -> bool:
    """Return whether the first object of the image at a position is a crowd."""
    return position % CROWD_EVERY == CROWD_POSITION


def draw_picture(split: str, position: int, seed: int = 0) -> tuple[Image.Image, list[DrawnObject]]:
    """Draw the image at a position of a split, and return it with its objects."""
    rng = np.random.default_rng([seed, FIRST_ID[split], position])
    width, height = rng.integers(*SIDES, 2, endpoint=True).tolist()
    size = (width, height)
    background = rng.uniform(40, 215) + rng.uniform(-35, 35, 3)
    picture = _texture(rng, size, background)
    _draw_lines(rng, picture)
    if position % EMPTY_EVERY == EMPTY_POSITION:
        count = 0
    else:
        count = 1 + rng.choice(len(OBJECTS_PER_IMAGE), p=OBJECTS_PER_IMAGE)
    objects = []
    for category in rng.choice(list(CATEGORIES), count).tolist():
        is_crowd = has_crowd(position) and not objects
        objects = _add_object(rng, picture, objects, category, is_crowd)
    return _blur_and_add_noise(rng, picture), objects


def _draw_lines(rng: np.random.Generator, picture: Image.Image) -> None:
    """Draw lines that are no objects."""
    for _ in range(rng.integers(5)):
        colour = tuple(rng.integers(256, size=3).tolist())
        ends = rng.uniform(0, picture.size * 2).tolist()
        ImageDraw.Draw(picture).line(ends, colour, rng.integers(1, 5))


def _add_object(
    rng: np.random.Generator,
    picture: Image.Image,
    objects: list[DrawnObject],
    category: str,
    is_crowd: bool,
) -> list[DrawnObject]:
    """Draw an object over the others, and return all of them with what is then visible.

    At least half of every object stays in sight. Where no such position is tried, the picture and
    the objects stay as they are.
    """
    for _ in range(TRIES):
        mask = draw_mask(rng, picture.size, category, is_crowd)
        covered = np.asarray(mask) > 127
        tried = []
        for other in objects:
            tried.append(other._replace(visible=other.visible & ~covered))
        tried.append(DrawnObject(category, covered.sum(), covered))
        if all(2 * drawn.visible.sum() > drawn.area for drawn in tried):
            behind = np.asarray(picture)[covered].mean(axis=0)
            colour = _colour_unlike(rng, behind)
            picture.paste(_texture(rng, picture.size, colour), mask=mask)
            return tried
    return objects


def _colour_unlike(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """Draw a colour (3,) that is not muted, and not like the one behind it (3,)."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.ptp(colour) >= 120 and np.linalg.norm(colour - behind) >= 90:
            return colour


def _blur_and_add_noise(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    strength = rng.uniform(0, 8)
    noise = strength * rng.standard_normal((picture.height, picture.width, 3), np.float32)
    pixels = np.asarray(picture) + noise
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _texture(rng: np.random.Generator, size: tuple[int, int], colour: np.ndarray) -> Image.Image:
    """Draw grain, bars, blobs or a gradient of `size` (width, height) in two shades of `colour`."""
    width, height = size
    cell_height, cell_width = np.exp(rng.uniform(np.log(3), np.log(100), 2))  # pixels
    grid_size = (int(2 + height // cell_height), int(2 + width // cell_width))
    grid = rng.integers(256, size=grid_size, dtype=np.uint8)
    blend = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
    shades = colour + rng.normal(0, 22, (2, 3))
    dark, light = shades.clip(0, 255).astype(int).tolist()
    return ImageOps.colorize(blend, dark, light)


def draw_mask(
    rng: np.random.Generator, size: tuple[int, int], category: str, is_crowd: bool
) -> Image.Image:
    """Draw where a shape, or the small shapes of a crowd, cover the pixels: 0..255.

    `size` is (width, height).
    """
    is_tiny = is_crowd or rng.random() < 0.02
    if is_tiny:
        side = rng.uniform(8, 16)
    else:
        side = rng.uniform(0.16, 0.6) * min(size)
    centre = rng.uniform(0, size)
    if is_crowd:
        offsets = rng.normal(0, 1.5 * side, (CROWD_SIZE, 2))
    else:
        offsets = np.zeros((1, 2))
    width, height = size
    mask = Image.new("L", (OVERSAMPLING * width, OVERSAMPLING * height))
    for offset in offsets:
        outline = side * random_shape(rng, category) + centre + offset
        # Pillow names a pixel by its centre: without the half, shapes grow by a quarter pixel.
        corners = OVERSAMPLING * outline - 0.5
        ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=255)
    return mask.reduce(OVERSAMPLING)


def random_shape(rng: np.random.Generator, category: str) -> np.ndarray:
    """Return a polygon (P, 2): a randomly turned shape about the origin; its longer side is 1."""
    num_corners, inner_radius = OUTLINES[category]
    points = np.exp(2j * np.pi * (np.arange(num_corners) + 0.5) / num_corners)
    points[1::2] *= inner_radius
    points.real *= rng.uniform(0.7, 1)
    points *= np.exp(2j * np.pi * rng.random())
    points = np.stack([points.real, points.imag], axis=1)
    centre = (points.max(axis=0) + points.min(axis=0)) / 2
    longer_side = np.ptp(points, axis=0).max()
    return (points - centre) / longer_side


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the built-in COCO-format sample.")
    parser.add_argument("folder", metavar="DIR", help="new or empty folder for the set")
    parser.add_argument("--train", type=int, default=240, help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=60, help="validation images (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        write_sample(options.folder, train=options.train, val=options.val)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.train} training and {options.val} validation images in {options.folder}")


if __name__ == "__main__":
    main()
