#!/usr/bin/env python3
"""Detect and draw: SSD300-ResNet34 on images, or on folders of images such as a video's frames.

    python3 demo.py IMAGE FOLDER ... --checkpoint FILE
    python3 demo.py                                      newest checkpoint, built-in sample

Pictures keep the names of their images, below the folder that all have in common; `results.json`
lists what is drawn. A file that cannot be read is told and left out; the exit status is 1 then.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: F401 before torch

# isort: split

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.coco.draw import draw_boxes
from common.coco.images import read_image
from common.coco.sample import write_sample
from common.errors import UserError
from common.npu import cli, entry
from common.npu.device import memory_format, setup_device
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.data import normalise, resize
from ssd_resnet34.evaluate import own_network
from ssd_resnet34.model import build_model
from ssd_resnet34.postprocess import Detections, detect
from ssd_resnet34.weights import class_names_of, load_weights, num_classes_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device, why = setup_device(args.device, args.device_id)
    print(why)
    state = cli.checkpoint_to_use(args)
    recipe, class_names = own_network(RECIPES["1p"], state), class_names_of(state)
    model = build_model(recipe, num_classes_of(state)).eval()
    print(f"{state['path']}: {load_weights(model, state).demand_all(state['path'])}")
    model.to(device, memory_format=memory_format(device))

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        inputs = args.inputs + args.img
        if not inputs:
            write_sample(Path(scratch, "sample"), train=1, val=12)
            inputs = [Path(scratch, "sample", "val2017")]
        files = find_images(inputs, args.show_dir)
        started = time.perf_counter()
        for name, image, found in detect_files(model, files, recipe, device, args.batch_size):
            boxes, scores, labels = shown(found, image, args.min_score)
            results[name] = {
                "boxes": boxes.double().round(decimals=2).tolist(),  # xyxy, pixels
                "scores": scores.double().round(decimals=4).tolist(),
                "classes": [class_names[label] for label in labels],
            }
            picture = draw_boxes(image, boxes, labels, class_names, scores)
            try:
                (args.show_dir / name).parent.mkdir(parents=True, exist_ok=True)
                picture.save(args.show_dir / name, quality=95)
            except OSError as error:
                raise UserError(f"{args.show_dir / name} cannot be written: {error}") from None
    speed = len(results) / (time.perf_counter() - started)
    if results:
        text = json.dumps(results, indent=1, ensure_ascii=False)
        (args.show_dir / "results.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(results)} of {len(files)} images drawn in {args.show_dir}, {speed:.1f} images/s")
    return int(len(results) < len(files))


def parse(argv: list[str] | None):
    parser = cli.parser(__doc__.split("\n")[0], "files", "device")
    parser.add_argument("inputs", nargs="*", metavar="IMAGE|FOLDER", help="default: sample images")
    parser.add_argument("--img", nargs="+", default=[], metavar="IMAGE|FOLDER", help="the same")
    cli.add(parser, "--show-dir", Path("demo_output"), "for the pictures")
    cli.add(parser, "--min-score --score-thr", 0.3, "to be drawn")
    cli.add(parser, "-b --batch-size", 8, "images at a time")
    return parser.parse_args(argv)


def find_images(inputs: Sequence[str | Path], show_dir: Path) -> dict[str, Path]:
    """Image files by their path below their common folder; folders are walked in sorted order.

    What lies in `show_dir` is left out. Raises UserError for an input that comes to nothing.
    """
    show_dir = Path(os.path.abspath(show_dir))
    found = []
    for given in inputs:
        path = Path(os.path.abspath(given))
        if not path.exists():
            raise UserError(f"{given} does not exist; give images or folders of images")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        outside = [file for file in images if show_dir not in file.parents]
        if not outside:
            reason = "lies in --show_dir" if images else f"no image ({' '.join(SUFFIXES)})"
            raise UserError(f"{given}: {reason}; give other images or another folder")
        found += outside
    root = os.path.commonpath([file.parent for file in found])
    return {file.relative_to(root).as_posix(): file for file in found}


@torch.no_grad()
def detect_files(
    model: nn.Module, files: dict[str, Path], recipe: Recipe, device: torch.device, batch_size: int
) -> Iterator[tuple[str, np.ndarray, Detections]]:
    """Name, upright image (H, W, 3) uint8 and detections of every file that can be read."""
    images = {}
    silent = not sys.stderr.isatty()
    for count, name in enumerate(tqdm(files, "detecting", leave=False, disable=silent), 1):
        try:
            images[name] = read_image(str(files[name]), ignore_exif=False)
        except UserError as error:
            tqdm.write(f"skipped: {str(error).split(';')[0]}", file=sys.stderr)
        if images and (len(images) >= batch_size or count == len(files)):
            resized = [resize(image, recipe.image_size) for image in images.values()]
            sizes = torch.tensor([image.shape[:2] for image in images.values()])
            outputs = model(normalise(torch.stack(resized).to(device), recipe))
            yield from zip(images, images.values(), detect(outputs, sizes, recipe), strict=True)
            images = {}


def shown(found: Detections, image: np.ndarray, min_score: float) -> Detections:
    """The detections from `min_score` on, their boxes cut at the border of the image."""
    height, width = image.shape[:2]
    keep = found.scores >= min_score
    boxes = found.boxes[keep].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    return Detections(boxes, found.scores[keep], found.labels[keep])


if __name__ == "__main__":
    entry.run(main)
