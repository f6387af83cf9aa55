#!/usr/bin/env python3
"""Compare the detectors of this repository.

    python3 compare.py --data DIR        which of them sees the objects of a data set

The table has a line for each preset of the four models and of the TFRecord recipe, as far as they
see other boxes: the size of the network input, and the share of the training set's boxes that have
an anchor (FCOS: a point), by the size of the box in its image. No network is built and no image is
read.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import importlib

from common import flags
from common.coco.compare_presets import compare_presets
from common.coco.coverage import Presets
from common.coco.layout import find_coco
from common.npu import entry

MODELS = ("ssd_resnet34", "ssd_resnet34.tfrecord", "ssd_mmdet", "fcos", "m2det")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    compare_on_data(args.data, args.train_annotations, args.train_images)


def parse(argv: list[str] | None):
    parser = flags.Parser(
        description="Compare the detectors of this repository: --data shows which of them sees the "
        "objects of a data set."
    )
    group = parser.add_argument_group("which detector sees the objects of a data set")
    flags.add(group, "--data --data-path", "", "folder of a COCO-format data set")
    flags.add(group, "--train-annotations", "", "its annotation file, if it has another name")
    flags.add(group, "--train-images", "", "its folder of images, if it has another name")
    args = parser.parse_args(argv)
    if not (args.data or args.train_annotations):
        parser.error("nothing to compare: give a data set with --data=DIR")
    return args


def compare_on_data(data_path: str, annotations: str, images: str) -> None:
    """Print which boxes of a training set the presets of all models see."""
    files = find_coco(data_path, "train", annotations, images)
    presets = {}
    for model in MODELS:
        recipes = importlib.import_module(f"{model}.config").RECIPES
        matching = importlib.import_module(f"{model}.coverage").MATCHING
        name = next(iter(recipes))
        presets[model.replace(".", "/")] = Presets(name, recipes[name], recipes, matching)
    for line in compare_presets(files, presets):
        print(line)


if __name__ == "__main__":
    entry.run(main)
