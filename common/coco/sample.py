"""The built-in sample: a small COCO-format data set of drawn shapes, so that nothing is downloaded.

    python3 -m common.coco.sample DIR [--train N] [--val N] [--seed S]

Four classes that differ in geometry only (colour, size, place and turn say nothing about the
class) on textured backgrounds, with occlusion, cut-off and tiny shapes, crowd regions and images
without any object. Every image has a random stream of its own, made of (seed, split, position):
a larger set begins with the images of a smaller one.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.npu.errors import UserError

# Ids with gaps, as COCO's own: whoever takes an id for a label fails on this set as well.
CATEGORIES = {"disc": 1, "box": 3, "triangle": 4, "star": 9}
FIRST_ID = {"train": 1, "val": 500_001}
SIDES = 240, 400  # pixels: the range of an image's height and width
OBJECTS_PER_IMAGE = (0.20, 0.26, 0.22, 0.14, 0.08, 0.05, 0.03, 0.02)  # of 1, 2, ... 8 objects


def write_sample(
    folder: str | os.PathLike,
    *,
    train: int = 240,
    val: int = 60,
    seed: int = 0,
) -> None:
    """Draw the set: `{train,val}2017/*.jpg` and `annotations/instances_{train,val}2017.json`.

    `train` and `val` count images. The folder appears whole or not at all. Raises UserError where
    it exists and is not empty.
    """
    folder = Path(folder).resolve()
    if min(train, val) < 1 or max(train, val) >= FIRST_ID["val"] or seed < 0:
        raise UserError(
            f"sample of {train} + {val} images, seed {seed}: counts from 1, seed from 0"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; remove it or name another folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        (partial / "annotations").mkdir(parents=True)
        for split, count in (("train", train), ("val", val)):
            _write_split(partial, split, count, seed)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_split(root: Path, split: str, count: int, seed: int) -> None:
    (root / f"{split}2017").mkdir()
    images, annotations = [], []
    for position in range(count):
        rng = np.random.default_rng([seed, FIRST_ID[split], position])
        image, objects = _draw_image(rng, empty=position % 30 == 14, crowd=position % 20 == 9)
        image_id = FIRST_ID[split] + position
        name, (width, height) = f"{image_id:012d}.jpg", image.size
        image.save(root / f"{split}2017" / name, quality=90)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for record in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **record})
    content = {
        "info": {"description": f"onestage sample, {split}, seed {seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": ident, "name": name} for name, ident in CATEGORIES.items()],
    }
    path = root / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def _draw_image(
    rng: np.random.Generator, *, empty: bool, crowd: bool
) -> tuple[Image.Image, list[dict]]:
    """One picture and the annotations of its objects, without ids."""
    height, width = rng.integers(*SIDES, 2, endpoint=True).tolist()
    canvas = _background(rng, height, width)
    owner = np.full((height, width), -1)  # the object seen at each pixel
    kinds, full_areas = [], []
    count = 0 if empty else 1 + rng.choice(len(OBJECTS_PER_IMAGE), p=OBJECTS_PER_IMAGE)
    for number in range(count):
        kind = str(rng.choice(list(CATEGORIES)))
        is_crowd = crowd and number == 0
        for _ in range(30):  # tries for a place that leaves half of every object in sight
            outlines = _outlines(rng, kind, height, width, is_crowd)
            coverage = _rasterize(outlines, height, width)
            full_area = sum(_polygon_area(outline) for outline in outlines)
            seen = np.where(coverage >= 0.5, len(kinds), owner)
            visible = np.bincount(seen[seen >= 0], minlength=len(kinds) + 1)
            if np.all(visible >= 0.5 * np.array([*full_areas, full_area])):
                owner = seen
                kinds.append((kind, is_crowd))
                full_areas.append(full_area)
                _paint(rng, canvas, coverage)
                break
    objects = [
        _annotation(owner == number, kind, is_crowd)
        for number, (kind, is_crowd) in enumerate(kinds)
    ]
    return _photograph(rng, canvas), objects


def _annotation(mask: np.ndarray, kind: str, is_crowd: bool) -> dict:
    """COCO's record of the visible pixels `mask` (H, W) bool; the segmentation is a plain RLE."""
    rows, columns = _extent(mask)
    by_column = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(by_column, prepend=False))
    return {
        "category_id": CATEGORIES[kind],
        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        "area": int(mask.sum()),
        "iscrowd": int(is_crowd),
        "segmentation": {
            "size": list(mask.shape),
            "counts": np.diff([0, *changes, mask.size]).tolist(),
        },
    }


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the tight box about `mask` (H, W) bool."""
    hits = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    return tuple(slice(hit[0], hit[-1] + 1) for hit in hits)


def _outlines(
    rng: np.random.Generator, kind: str, height: int, width: int, is_crowd: bool
) -> list[np.ndarray]:
    """Polygons (P, 2) xy in pixels: one shape, or the small shapes of a crowd."""
    centre = rng.uniform((0, 0), (width, height))
    if is_crowd:
        side = rng.uniform(10, 16)
        columns, rows = rng.integers(3, 5, 2, endpoint=True)
        cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
        cells = cells - cells.mean(0) + rng.uniform(-0.2, 0.2, cells.shape)
        return [_shape(rng, kind) * side + centre + 1.5 * side * cell for cell in cells]
    side = (
        rng.uniform(8, 16) if rng.random() < 0.02 else rng.uniform(0.16, 0.6) * min(height, width)
    )
    return [_shape(rng, kind) * side + centre]


def _shape(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Polygon (P, 2) of a randomly turned shape about the origin; its longer side is 1."""
    corners = {"disc": 64, "box": 4, "triangle": 3, "star": 10}[kind]
    turn = 2 * np.pi * np.arange(corners) / corners + (np.pi / 4 if kind == "box" else 0)
    points = np.stack((np.cos(turn), np.sin(turn)), 1)
    if kind == "star":
        points[1::2] *= 0.42
    points[:, 0] *= rng.uniform(0.7, 1)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]])
    return (points - (points.max(0) + points.min(0)) / 2) / np.ptp(points, axis=0).max()


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def _rasterize(outlines: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Share of every pixel (H, W) that the polygons cover, 0..1 float32."""
    picture = Image.new("L", (4 * width, 4 * height))
    draw = ImageDraw.Draw(picture)
    for outline in outlines:
        # Pillow names a pixel by its centre: without the half, shapes grow by a quarter pixel.
        draw.polygon([tuple(point) for point in 4 * outline - 0.5], fill=255)
    return np.asarray(picture.reduce(4), np.float32) / 255


def _paint(rng: np.random.Generator, canvas: np.ndarray, coverage: np.ndarray) -> None:
    """Lay a textured fill over `canvas` (H, W, 3), in place, in colours unlike what is there."""
    window = _extent(coverage > 0)
    alpha, below = coverage[window][..., None], canvas[window]
    behind = (below * alpha).sum((0, 1)) / alpha.sum()
    fill = _texture(rng, *alpha.shape[:2], _vivid(rng, behind))
    canvas[window] = below + alpha * (fill - below)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Texture (H, W, 3) float32 with a few lines that are no objects."""
    texture = _texture(rng, height, width, _muted(rng))
    picture = Image.fromarray(texture.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 5)):
        ends = rng.uniform((0, 0), (width, height), (2, 2)).ravel().tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.line(ends, fill=colour, width=int(rng.integers(1, 5)))
    return np.array(picture, np.float32)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """Two related colours (2, 3), 0..255, not far from grey."""
    pair = rng.uniform(40, 215) + rng.uniform(-35, 35, 3) + rng.normal(0, 20, (2, 3))
    return pair.clip(0, 255)


def _vivid(rng: np.random.Generator, unlike: np.ndarray) -> np.ndarray:
    """Two related colours (2, 3), 0..255, far from grey and from the colour `unlike` (3,)."""
    while True:
        pair = (rng.uniform(0, 255, 3) + rng.normal(0, 25, (2, 3))).clip(0, 255)
        mean = pair.mean(0)
        if np.ptp(mean) > 120 and np.linalg.norm(mean - unlike) > 90:
            return pair


def _texture(rng: np.random.Generator, height: int, width: int, colours: np.ndarray) -> np.ndarray:
    """Gradient, stripes, blobs or grain (H, W, 3) float32 that blend two `colours` (2, 3)."""
    style = rng.choice(["gradient", "stripes", "blobs", "grain"])
    if style in ("gradient", "stripes"):
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.ogrid[:height, :width]
        blend = x * np.cos(angle) + y * np.sin(angle)
        if style == "stripes":
            blend = np.sin(2 * np.pi * blend / rng.uniform(6, 40))
        blend = (blend - blend.min()) / max(np.ptp(blend), 1e-6)
    else:
        cell = rng.uniform(25, 80) if style == "blobs" else rng.uniform(2, 4)
        grid = rng.random((2 + int(height / cell), 2 + int(width / cell)), np.float32)
        blend = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    first, second = colours.astype(np.float32)
    texture = first + blend.astype(np.float32)[..., None] * (second - first)
    return texture.clip(0, 255)


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> Image.Image:
    """The finished picture: every other one a little out of focus, all with some noise."""
    image = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    noise = rng.standard_normal(canvas.shape, np.float32) * rng.uniform(0, 8)
    return Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m common.coco.sample", description="Draw the built-in COCO-format sample."
    )
    parser.add_argument("folder", metavar="DIR", help="new or empty folder for the set")
    parser.add_argument("--train", type=int, default=240, help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=60, help="validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another set (0)")
    options = parser.parse_args(arguments)
    try:
        write_sample(options.folder, train=options.train, val=options.val, seed=options.seed)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.train} training and {options.val} validation images in {options.folder}")


if __name__ == "__main__":
    main()
