#!/usr/bin/env python3
"""Compare runs, or the detectors of this repository.

    python3 compare.py RUN RUN ... --data DIR    trained detectors on the val set of a data set
    python3 compare.py --data DIR                which of the presets sees the objects of a data set

A RUN is the folder of a run, of which the best checkpoint counts, or a checkpoint of any of the
four models or of the TFRecord recipe. The table has COCO's metrics, the AP of each class, the time
of an image at batch size 1 and the size of the network. `compare.html` in --output_dir has that and
precision-recall curves and the same images side by side.

Without a run the table has a line for each preset of the four models and of the TFRecord recipe, as
far as they see other boxes: the size of the network input, and the share of the training set's
boxes that have an anchor (FCOS: a point), by the size of the box in its image. No network is built
and no image is decoded.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import importlib
from argparse import Namespace
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import flags
from common.coco.class_names import spelled_as
from common.coco.compare_presets import compare_presets
from common.coco.comparison import (
    Measured,
    detect_on,
    short_names,
    table_lines,
    write_comparison,
)
from common.coco.coverage import Presets
from common.coco.evaluation import evaluate, require_evaluator
from common.coco.index import CocoIndex, read_index
from common.coco.layout import find_coco
from common.coco.report import example_images
from common.errors import UserError
from common.files import require_writable
from common.fps.benchmark import measure_speed
from common.fps.network_size import count_flops, num_parameters
from common.npu import checkpoint, entry
from common.npu.device import DEVICES, setup_device
from common.npu.distributed import Ranks
from common.npu.identify import describe, model_of
from common.npu.loading import workers_per_rank
from common.npu.run import describe_program
from common.npu.weights import (
    classes_to_evaluate,
    notes_on_class_names,
    require_num_classes,
    shortened,
    tensors_of,
)

MODELS = ("ssd_resnet34", "ssd_resnet34.tfrecord", "ssd_mmdet", "fcos", "m2det")
SECONDS_OF_SPEED = 10.0  # to measure the time of an image


class Contender(NamedTuple):
    """A trained detector that is compared."""

    path: str  # of its checkpoint
    detector: object  # the Detector of its model
    program: ModuleType  # `evaluate` of its model
    class_names: tuple[str, ...] | None  # None for those of the val set
    turns_if_both_fit: bool  # as in ImageReader


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.runs:
        compare_runs(args)
    else:
        compare_on_data(args.data, args.train_annotations, args.train_images)


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.Parser(
        description="Compare runs on the val set of a data set. Without a run: which preset of "
        "the detectors sees the objects of its training set?"
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, or a checkpoint")
    flags.add(parser, "--data --data-path", "", "folder of a COCO-format data set")
    group = parser.add_argument_group("runs")
    flags.add(group, "--val-annotations", "", "annotation file, if it has another name")
    flags.add(group, "--val-images", "", "folder of images, if it has another name")
    flags.add(group, "--output-dir", Path("compare"), "where compare.html is written")
    flags.add(group, "--device", "auto", "what to run on", choices=DEVICES)
    flags.add(group, "--device-id", 0, "which card")
    flags.add(group, "--num-workers", -1, "threads that read images; -1: from the cores")
    flags.add(group, "--faster", False, "evaluate with the package faster-coco-eval")
    group = parser.add_argument_group("without runs")
    flags.add(group, "--train-annotations", "", "annotation file, if it has another name")
    flags.add(group, "--train-images", "", "folder of images, if it has another name")
    args = parser.parse_args(argv)
    if not (args.runs or args.data or args.train_annotations):
        parser.error("nothing to compare: give a data set with --data=DIR, or runs and a data set")
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


def compare_runs(args: Namespace) -> None:
    """Evaluate runs on a val set, print the table and write the page."""
    require_evaluator(args.faster)
    device, reason = setup_device(args.device, args.device_id)
    print(reason)
    files = find_coco(args.data, "val", args.val_annotations, args.val_images)
    contenders = [load_contender(run, device, files.annotation_file) for run in args.runs]
    first = contenders[0]
    records = read_index(files.annotation_file, files.image_dir, first.class_names)
    records.require_annotations()
    print(f"data: {files}, {len(records)} images")
    for line in records.lines():
        print(f"{records.annotation_file}: {line}")
    records_of_contenders = [records_of(one, first, records) for one in contenders]
    require_writable(args.output_dir)

    threads = max(1, workers_per_rank(args.num_workers, Ranks()))
    images = example_images(records, first.turns_if_both_fit)
    names = short_names([one.path for one in contenders])
    runs = []
    for name, one, own_records in zip(names, contenders, records_of_contenders, strict=True):
        with tqdm(total=len(records), desc=name, leave=False, disable=None) as bar:
            result_rows = detect_on(
                one.detector,
                one.program,
                own_records,
                one.turns_if_both_fit,
                threads,
                bar.update,
            )
        program = describe_program(
            one.detector.recipe, args.command, reason, one.detector.precision, world_size=1
        )
        program["checkpoint"] = one.path
        height, width = one.detector.prepare([images[0]]).shape[2:]
        runs.append(
            Measured(
                name=name,
                program=program,
                evaluation=evaluate(
                    records.annotation_file, result_rows, args.faster, records.class_names
                ),
                result_rows=result_rows,
                speed=measure_speed(one.detector, images, 1, SECONDS_OF_SPEED),
                num_parameters=num_parameters(one.detector.model),
                flops=count_flops(one.detector.model, height, width),
                input_size=(height, width),
            )
        )
    print("\n".join(table_lines(runs)))
    path = write_comparison(args.output_dir, runs, records, first.turns_if_both_fit)
    print(f"report: {path}")


def load_contender(run: str, device: torch.device, annotation_file: str) -> Contender:
    """Load the detector of a run's folder or of a checkpoint.

    Raise UserError where there is no checkpoint, or none of a model of this repository.
    """
    state = load_state(run)
    tensors = tensors_of(state)
    package = model_of(state, tensors).replace("/", ".")
    if package not in MODELS:
        raise UserError(
            f"{state['path']}: {describe(tensors) or 'an unknown network'}, not a detector of this "
            f"repository",
            "give runs or checkpoints of its models",
        )
    recipes = importlib.import_module(f"{package}.config").RECIPES
    detector_class = importlib.import_module(f"{package}.detector").Detector
    recipe = next(iter(recipes.values()))  # what the checkpoint does not say
    detector = detector_class.from_checkpoint(state, recipe, device)
    class_names = classes_to_evaluate(state, len(detector.class_names), annotation_file)
    for line in notes_on_class_names(state, class_names or detector.class_names):
        print(line)
    # The TFRecord recipe has no such rule: its records hold the images as they are stored.
    data = importlib.import_module(f"{package}.data")
    turns_if_both_fit = getattr(data, "TURNS_IF_BOTH_FIT", False)
    return Contender(
        path=state["path"],
        detector=detector,
        program=importlib.import_module(f"{package}.evaluate"),
        class_names=class_names,
        turns_if_both_fit=turns_if_both_fit,
    )


def load_state(run: str) -> dict:
    """Load a checkpoint, or of a run's folder the best one, else the newest one."""
    folder = Path(run)
    if not folder.is_dir():
        return checkpoint.load(run)
    state = checkpoint.load_best(folder)
    if state is None:
        raise UserError(f"{run}: no checkpoint in this folder", "give the folder of a run")
    return state


def records_of(contender: Contender, first: Contender, records: CocoIndex) -> CocoIndex:
    """Return the val set with the classes and category ids in the order of a detector's labels.

    Its annotations keep their labels: whoever only detects does not read them.

    Raise UserError where its classes are not those of the first one, which are those of `records`.
    """
    names = records.class_names
    if contender.class_names is not None:
        names = spelled_as(contender.class_names, records.class_names)
    missing = [name for name in records.class_names if name not in names]
    unknown = [name for name in names if name not in records.class_names]
    differences = []
    if missing:
        differences.append(f"{shortened(missing)} missing")
    if unknown:
        differences.append(f"{shortened(unknown)} besides")
    if differences:
        raise UserError(
            f"{contender.path}: its classes are not those of {first.path}: "
            f"{', '.join(differences)}",
            "compare runs of the same classes",
        )
    require_num_classes(contender.path, len(contender.detector.class_names), len(names))
    id_of_name = dict(zip(records.class_names, records.category_ids, strict=True))
    category_ids = tuple(id_of_name[name] for name in names)
    return replace(records, class_names=names, category_ids=category_ids)


if __name__ == "__main__":
    entry.run(main)
