"""The built-in sample: a small COCO-format data set of drawn shapes, for runs without a download.

    python3 -m common.coco.sample DIR [--train N] [--val N]

Four classes that differ in geometry only, on textured backgrounds, with occlusion, cut-off and
tiny shapes, crowd regions and images without objects. Every image has a random stream of its own,
of (seed, split, position): a larger set begins with the images of a smaller one.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from common.errors import UserError

# Ids with gaps, as COCO's own: whoever takes an id for a label fails on this set as well.
CATEGORIES = {"disc": 1, "box": 3, "triangle": 4, "star": 9}
OUTLINES = {"disc": (64, 1), "box": (4, 1), "triangle": (3, 1), "star": (10, 0.42)}
FIRST_ID = {"train": 1, "val": 500_001}
SIDES = 240, 400  # pixels: the range of an image's height and width
OBJECTS_PER_IMAGE = (0.20, 0.26, 0.22, 0.14, 0.08, 0.05, 0.03, 0.02)  # of 1, 2, ... 8 objects


def write_sample(folder: str | Path, train: int = 240, val: int = 60, seed: int = 0) -> None:
    """Draw the set: `{train,val}2017/*.jpg` and `annotations/instances_{train,val}2017.json`.

    `train`, `val`: numbers of images. The folder appears whole or not at all; one that exists and
    is not empty is refused (UserError).
    """
    folder = Path(folder).resolve()
    if min(train, val) < 1 or max(train, val) >= FIRST_ID["val"] or seed < 0:
        raise UserError(f"{train} + {val} images, seed {seed}: give counts from 1, a seed from 0")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        whole = Path(partial, "set")
        (whole / "annotations").mkdir(parents=True)
        for split, count in (("train", train), ("val", val)):
            _write_split(whole, split, count, seed)
        whole.replace(folder)


def _write_split(root: Path, split: str, count: int, seed: int) -> None:
    (root / f"{split}2017").mkdir()
    images, annotations = [], []
    for position in range(count):
        rng = np.random.default_rng([seed, FIRST_ID[split], position])
        crowd = position % 20 == 9
        picture, shown = _draw(rng, empty=position % 30 == 14, crowd=crowd)
        image_id, (width, height) = FIRST_ID[split] + position, picture.size
        name = f"{image_id:012d}.jpg"
        picture.save(root / f"{split}2017" / name, quality=90)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for number, (kind, pixels) in enumerate(shown):
            left, top, right, bottom = Image.fromarray(pixels).getbbox()
            own = {"id": len(annotations) + 1, "image_id": image_id, "area": int(pixels.sum())}
            own |= {"category_id": CATEGORIES[kind], "iscrowd": int(crowd and number == 0)}
            annotations.append(own | {"bbox": [left, top, right - left, bottom - top]})
    categories = [{"id": ident, "name": name} for name, ident in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


def _draw(rng: np.random.Generator, empty: bool, crowd: bool) -> tuple[Image.Image, list[tuple]]:
    """One picture and its objects: the class and where it is seen, (H, W) bool."""
    size = tuple(rng.integers(*SIDES, 2, endpoint=True).tolist())
    picture = _texture(rng, size, rng.uniform(40, 215) + rng.uniform(-35, 35, 3))
    for _ in range(rng.integers(5)):  # lines that are no objects
        colour = tuple(rng.integers(256, size=3).tolist())
        ImageDraw.Draw(picture).line(rng.uniform(0, size * 2).tolist(), colour, rng.integers(1, 5))
    kinds, areas, shown = [], [], []
    count = 0 if empty else 1 + rng.choice(len(OBJECTS_PER_IMAGE), p=OBJECTS_PER_IMAGE)
    for kind in rng.choice(list(CATEGORIES), count).tolist():
        for _ in range(30):  # tries for a place that leaves half of every object in sight
            mask = _mask(rng, size, kind, crowd and not kinds)
            covered = np.asarray(mask) > 127
            seen = [*(pixels & ~covered for pixels in shown), covered]
            full = [*areas, covered.sum()]
            if all(2 * pixels.sum() > area for pixels, area in zip(seen, full, strict=True)):
                kinds, areas, shown = [*kinds, kind], full, seen
                behind = colour = np.asarray(picture)[covered].mean(axis=0)
                while np.ptp(colour) < 120 or np.linalg.norm(colour - behind) < 90:  # not muted
                    colour = rng.uniform(0, 255, 3)
                picture.paste(_texture(rng, size, colour), mask=mask)
                break
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    noise = rng.uniform(0, 8) * rng.standard_normal((*size[::-1], 3), np.float32)
    pixels = (np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels), list(zip(kinds, shown, strict=True))


def _texture(rng: np.random.Generator, size: tuple[int, int], colour: np.ndarray) -> Image.Image:
    """Grain, bars, blobs or a gradient in two shades of `colour` (3,)."""
    cells = np.exp(rng.uniform(np.log(3), np.log(100), 2))  # pixels
    grid = rng.integers(256, size=(2 + size[::-1] // cells).astype(int), dtype=np.uint8)
    blend = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
    shades = (colour + rng.normal(0, 22, (2, 3))).clip(0, 255).astype(int).tolist()
    return ImageOps.colorize(blend, *shades)


def _mask(rng: np.random.Generator, size: tuple, kind: str, crowd: bool) -> Image.Image:
    """Where one shape, or the small shapes of a crowd, cover the pixels: 0..255."""
    tiny = crowd or rng.random() < 0.02
    side = rng.uniform(8, 16) if tiny else rng.uniform(0.16, 0.6) * min(size)
    centre = rng.uniform(0, size)
    mask = Image.new("L", (4 * size[0], 4 * size[1]))
    for offset in rng.normal(0, 1.5 * side, (16, 2)) if crowd else np.zeros((1, 2)):
        # Pillow names a pixel by its centre: without the half, shapes grow by a quarter pixel.
        outline = 4 * (side * _shape(rng, kind) + centre + offset) - 0.5
        ImageDraw.Draw(mask).polygon(outline.ravel().tolist(), fill=255)
    return mask.reduce(4)


def _shape(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Polygon (P, 2) of a randomly turned shape about the origin; its longer side is 1."""
    corners, inner_radius = OUTLINES[kind]
    points = np.exp(2j * np.pi * (np.arange(corners) + 0.5) / corners)
    points[1::2] *= inner_radius
    points.real *= rng.uniform(0.7, 1)
    points *= np.exp(2j * np.pi * rng.random())
    points = np.stack([points.real, points.imag], axis=1)
    return (points - (points.max(0) + points.min(0)) / 2) / np.ptp(points, axis=0).max()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the built-in COCO-format sample.")
    parser.add_argument("folder", metavar="DIR", help="new or empty folder for the set")
    parser.add_argument("--train", type=int, default=240, help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=60, help="validation images (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        write_sample(**vars(options))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.train} training and {options.val} validation images in {options.folder}")


if __name__ == "__main__":
    main()
