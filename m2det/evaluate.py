#!/usr/bin/env python3
"""Evaluate M2Det on a COCO-format val set (COCO 2014: minival).

    python3 evaluate.py --data DIR --checkpoint FILE                  one device
    python3 ../common/npu/launch.py --nproc_per_node=8 evaluate.py ...

Each image counts once, whatever the number of ranks and the batch size. `--format_only` writes
the results in COCO's submission format and computes nothing, `--benchmark` measures the speed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import flags
from common.coco.analysis_report import write_analysis
from common.coco.evaluation import (
    DETECTIONS_FILE,
    Evaluation,
    EvaluationOptions,
    gather_result_rows,
    require_evaluator,
    save_results,
    to_result_rows,
)
from common.coco.index import CocoIndex
from common.coco.page import write_report
from common.coco.report import (
    METRICS_FILE,
    RESULTS_FILE,
    draw_examples,
    example_images,
    image_by_id,
    report_results,
    turned_images,
)
from common.files import require_writable
from common.fps.benchmark import DEFAULT_BATCH_SIZES, report_speed
from common.fps.network_size import num_parameters
from common.fps.summary import write_summary
from common.npu import entry
from common.npu.device import in_host_memory
from common.npu.distributed import Ranks
from common.npu.loading import workers_per_rank
from common.npu.overlap import HostWork
from common.npu.precision import Precision
from common.npu.run import describe_program, start_process
from common.npu.weights import classes_to_evaluate, notes_on_class_names, require_num_classes
from m2det.config import RECIPES, Recipe
from m2det.data import TURNS_IF_BOTH_FIT, build_loader, find_files, normalise, read_records
from m2det.detector import Detector
from m2det.old_flags import OLD_FLAGS
from m2det.postprocess import Started, finish_detect, start_detect, submission_boxes
from m2det.weights import note_on_image_size, num_classes_of, recipe_of_checkpoint


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ranks, device, reason = start_process(
        args.device, args.device_id, args.timeout, args.deterministic, args.exact
    )
    log = print if ranks.main else log_nothing
    log(reason)

    state = flags.checkpoint_to_use(args, Recipe.model, ranks)
    recipe = recipe_of_checkpoint(flags.chosen_recipe(args, RECIPES), state)
    recipe = flags.require_agreement(args, recipe, state)
    note = note_on_image_size(args.recipe, recipe, state)
    if note is not None:
        log(note)
    detector = Detector.from_checkpoint(state, recipe, device)
    recipe = replace(detector.recipe, name=recipe.name, threshold=flags.ap_goal(args, state))
    files = find_files(args.data, "val", args.val_annotations, args.val_images)
    class_names = classes_to_evaluate(state, num_classes_of(state), files[0].annotation_file)
    records = read_records(files, class_names)
    for file in files:
        log(f"data: {file}")
    for line in records.lines():
        log(f"{records.annotation_file}: {line}")
    if not args.format_only:
        records.require_annotations()
    num_classes = len(records.class_names)
    flags.check_num_classes(args, num_classes)
    require_num_classes(state["path"], len(detector.class_names), num_classes)
    log(f"{state['path']}: {detector.report}")
    for line in notes_on_class_names(state, records.class_names):
        log(line)

    # What is needed after detecting must be there before it.
    options = flags.evaluation_options(args)
    if ranks.main:
        require_writable(args.output_dir)
    if not args.format_only:
        require_evaluator(options.faster)

    # The recipe's precision is that of training; evaluation is fp32 unless --amp is given.
    level = getattr(args, "amp", "O0")
    precision = Precision(device, level, dtype=args.amp_dtype)
    log(f"precision: {precision}")
    if hasattr(args, "benchmark"):  # the flag was given
        if ranks.main:
            detector.precision = precision
            images = example_images(records, TURNS_IF_BOTH_FIT)
            batch_sizes = args.benchmark or DEFAULT_BATCH_SIZES
            report_speed(detector, images, batch_sizes, args.output_dir / METRICS_FILE, log)
        return
    workers = workers_per_rank(args.num_workers, ranks)
    began = time.perf_counter()
    result_rows = detect_all(
        detector.model, recipe, records, device, ranks, workers, precision, log
    )
    images_per_second = len(records) / (time.perf_counter() - began)
    if result_rows is None:
        return
    if args.format_only:
        path = args.output_dir / RESULTS_FILE
        save_results(path, result_rows)
        log(f"{len(result_rows)} detections in {len(records)} images: {path}")
        return
    evaluation = evaluate_and_save(
        result_rows,
        records,
        recipe,
        args.output_dir,
        options,
        log,
        images_per_second=images_per_second,
    )
    closing_lines = write_summary(
        args.output_dir,
        network=f"{args.tag}{recipe.name}",
        batch_size=recipe.eval_batch_size,
        num_ranks=ranks.world_size,
        kind="eval",
        seconds=time.time() - args.started,
        accuracy=evaluation.stats["AP"],
    )
    log("\n".join(closing_lines))
    if options.analysis:
        read_image = image_by_id(records, TURNS_IF_BOTH_FIT)
        write_analysis(
            args.output_dir, records.annotation_file, records.class_names, read_image, log
        )
    program = describe_program(recipe, args.command, reason, precision, ranks.world_size)
    program["checkpoint"] = state["path"]
    write_report(args.output_dir, num_parameters(detector.model), log, program)


def parse(argv: list[str] | None) -> Namespace:
    groups = ("data", "files", "evaluation", "device", "process")
    parser = flags.make_parser(__doc__, *groups, recipes=RECIPES, old_flags=OLD_FLAGS)
    flags.add(parser, "--format-only", False, "write results, no metrics")
    flags.add(
        parser,
        "--benchmark",
        DEFAULT_BATCH_SIZES,
        "measure the speed of an image instead of accuracy, at these batch sizes",
        only_if_given=True,
    )
    flags.add(parser, "--tag", "", "put before the network's name in the summary")
    return parser.parse_args(argv)


def log_nothing(text: str) -> None:
    """Ignore a line: only the main rank logs."""


@torch.no_grad()
def detect_all(
    model: nn.Module,
    recipe: Recipe,
    records: CocoIndex,
    device: torch.device,
    ranks: Ranks,
    workers: int,
    precision: Precision | None = None,
    log: Callable[[str], None] = log_nothing,
) -> np.ndarray | None:
    """Detect on every image once, shared among the ranks.

    The network runs in fp32 unless another `precision` is given. `log` gets a line on the images
    that were turned by their EXIF orientation. Return the result rows of all ranks on the main one,
    None on the others.
    """
    precision = precision or Precision(device)
    loader = build_loader(
        recipe,
        records,
        training=False,
        ranks=ranks,
        workers=workers,
        pin_memory=not in_host_memory(device),
    )
    was_training = model.training
    model.eval()
    show_bar = ranks.main and sys.stderr.isatty()
    batches = tqdm(loader, "evaluating", leave=False, disable=not show_bar)
    with HostWork(device) as host_work:
        for images, sizes, image_ids in batches:
            inputs = normalise(images.to(device, non_blocking=True), recipe)
            with precision.autocast():
                outputs = model(inputs)
            started = start_detect(outputs, recipe)
            # Beside the next batch: the device need not wait for the host's part of this one.
            host_work.add(rows_of_batch, started, sizes, image_ids, recipe, records)
        rows_of_batches = host_work.results()
    model.train(was_training)
    for line in turned_images(loader.dataset.reader, len(records), ranks):
        log(f"data: {line}")
    result_rows = []
    for rows in rows_of_batches:
        result_rows += rows
    return gather_result_rows(result_rows, ranks)


def rows_of_batch(
    started: Started, sizes: Tensor, image_ids: Tensor, recipe: Recipe, records: CocoIndex
) -> list[np.ndarray]:
    """Return the result rows of each image of a batch whose detection was started.

    `sizes` (N, 2) are their original (height, width) in pixels.
    """
    detections = finish_detect(started, sizes, recipe)
    result_rows = []
    for image_id, of_image in zip(image_ids.tolist(), detections, strict=True):
        boxes = submission_boxes(of_image.boxes.numpy(), recipe)
        result_rows.append(
            to_result_rows(image_id, boxes, of_image.scores, of_image.labels, records.category_ids)
        )
    return result_rows


def evaluate_and_save(
    result_rows: np.ndarray,
    records: CocoIndex,
    recipe: Recipe,
    folder: Path,
    options: EvaluationOptions,
    log: Callable[[str], None],
    step: int | None = None,
    images_per_second: float | None = None,
) -> Evaluation:
    """Evaluate result rows, log the metrics, and save them, rows and pictures in the output folder.

    `step` is that of a run, `images_per_second` the speed of detecting where it was measured; they
    are saved with the metrics.
    """
    evaluation = report_results(
        result_rows,
        records.annotation_file,
        len(records),
        folder,
        options,
        log,
        records.class_names,
        goal=recipe.threshold,
        step=step,
        images_per_second=images_per_second,
    )
    draw_examples(folder / DETECTIONS_FILE, records, result_rows, TURNS_IF_BOTH_FIT)
    return evaluation


if __name__ == "__main__":
    entry.run(main)
