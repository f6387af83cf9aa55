#!/usr/bin/env python3
"""Evaluate the newest checkpoint of the TFRecord recipe: every record counts once.

    python3 evaluate.py --validation_file_pattern='tfrecord/val2017*' \\
        --val_json_file=instances_val2017.json --model_dir=result_npu

The metrics are COCO's, under the names of the TensorFlow port. `--benchmark` measures the speed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import flags
from common.coco.analysis_report import write_analysis
from common.coco.evaluation import (
    Evaluation,
    EvaluationOptions,
    gather_result_rows,
    require_evaluator,
    to_result_rows,
)
from common.coco.index import CocoIndex, read_annotations
from common.coco.page import write_report
from common.coco.report import METRICS_FILE, report_results, spread_over
from common.errors import UserError
from common.files import require_writable
from common.fps.benchmark import DEFAULT_BATCH_SIZES, report_speed
from common.fps.network_size import num_parameters
from common.fps.runlog import RunLog
from common.npu import checkpoint, entry
from common.npu.device import in_host_memory
from common.npu.distributed import Ranks
from common.npu.loading import workers_per_rank
from common.npu.overlap import HostWork
from common.npu.precision import Precision
from common.npu.run import describe_program, start_process
from common.npu.weights import notes_on_class_names
from ssd_resnet34.data import normalise
from ssd_resnet34.postprocess import Started
from ssd_resnet34.tfrecord.config import EVALUATION_FOLDER, RECIPES, Recipe
from ssd_resnet34.tfrecord.data import build_loader
from ssd_resnet34.tfrecord.detector import Detector
from ssd_resnet34.tfrecord.index import RecordIndex, read_index, wrong_size
from ssd_resnet34.tfrecord.options import parse, require_files, require_ranks
from ssd_resnet34.tfrecord.port_lines import announce
from ssd_resnet34.tfrecord.postprocess import finish_detect, start_detect
from ssd_resnet34.tfrecord.weights import recipe_of_checkpoint

# What the TensorFlow port calls COCO's twelve metrics.
PORT_NAMES = {
    "AP": "COCO/AP",
    "AP50": "COCO/AP50",
    "AP75": "COCO/AP75",
    "APsmall": "COCO/APs",
    "APmedium": "COCO/APm",
    "APlarge": "COCO/APl",
    "AR1": "COCO/ARmax1",
    "AR10": "COCO/ARmax10",
    "AR100": "COCO/ARmax100",
    "ARsmall": "COCO/ARs",
    "ARmedium": "COCO/ARm",
    "ARlarge": "COCO/ARl",
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv, __doc__)
    require_files(args, "eval")
    require_ranks()
    requested = flags.chosen_recipe(args, RECIPES)
    if args.find_batch_size:
        raise UserError("--batch_size auto: only training finds a batch size", "give a number")
    ranks, device, reason = start_process(
        args.device, args.device_id, args.timeout, args.deterministic, args.exact, args.card
    )
    state = None
    if ranks.main:
        state = checkpoint.load_newest(args.model_dir)
    state = ranks.from_main(state)
    if state is None:
        raise UserError(f"no checkpoint in --model_dir={args.model_dir}; train first")
    recipe = recipe_of_checkpoint(requested, state)
    recipe = flags.require_agreement(args, recipe, state)
    detector = Detector.from_checkpoint(state, recipe, device)
    records = read_index(args.validation_file_pattern, "--validation_file_pattern")
    records = replace(records, category_ids=recipe.category_ids, class_names=detector.class_names)
    records, notes = validation_records(records, args.val_json_file)
    # What is needed after detecting must be there before it.
    options = flags.evaluation_options(args)
    if ranks.main:
        require_writable(args.model_dir / EVALUATION_FOLDER)
    require_evaluator(options.faster)

    # The recipe's precision is that of training; evaluation is fp32 unless --amp is given.
    level = getattr(args, "amp", "O0")
    precision = Precision(device, level, dtype=args.amp_dtype)
    workers = workers_per_rank(args.num_workers, ranks)

    with RunLog(ranks, workers) as log:
        log.open(args.model_dir, args.device_id)
        log.info(reason)
        log.info(f"precision: {precision}")
        log.info(f"{state['path']}: {detector.report}")
        for line in notes_on_class_names(state, detector.class_names):
            log.info(line)
        log.warn_of(args.val_json_file, notes)
        if hasattr(args, "benchmark"):  # the flag was given
            if ranks.main:
                detector.precision = precision
                images = [records.pixels(records.read(i), i) for i in spread_over(len(records))]
                batch_sizes = args.benchmark or DEFAULT_BATCH_SIZES
                metrics_file = args.model_dir / EVALUATION_FOLDER / METRICS_FILE
                report_speed(detector, images, batch_sizes, metrics_file, log.info)
            return
        steps = state.get("iteration")
        if not isinstance(steps, int):
            log.info(f"{state['path']}: does not say its step: the metrics are logged without one")
        began = time.perf_counter()
        result_rows = detect_all(detector.model, recipe, records, device, ranks, workers, precision)
        images_per_second = len(records) / (time.perf_counter() - began)
        if result_rows is None:
            return
        evaluation = evaluate_and_save(
            result_rows,
            records,
            args.val_json_file,
            args.model_dir,
            options,
            log.info,
            images_per_second=images_per_second,
        )
        if options.analysis:
            write_analysis(
                args.model_dir / EVALUATION_FOLDER,
                args.val_json_file,
                records.class_names,
                records.image_by_id,
                log.info,
            )
        if isinstance(steps, int):
            steps_per_epoch = recipe.iters_per_epoch(ranks.world_size)
            lr = recipe.lr_at(steps - 1, steps_per_epoch, ranks.world_size, recipe.batch_size)
            log.begin(steps, steps, steps_per_epoch)
            log.val(steps, lr, evaluation.mmdet())
        program = describe_program(recipe, args.command, reason, precision, ranks.world_size)
        program["checkpoint"] = state["path"]
        write_report(
            args.model_dir,
            num_parameters(detector.model),
            log.info,
            program,
            evaluation_folder=args.model_dir / EVALUATION_FOLDER,
        )


def validation_records(records: RecordIndex, val_json_file: str) -> tuple[RecordIndex, list[str]]:
    """Return the records with the sizes of the JSON file, and a line for each thing noticed in it.

    Raise UserError where the file has errors or no usable annotation, where it does not have an
    image or a category of the records, and where it has an image in another size: now, not after
    days of training.
    """
    annotations = read_annotations(val_json_file, classes=records.class_names)
    annotations.raise_errors()
    missing = sorted(set(records.category_ids) - set(annotations.category_ids))
    if missing:
        raise UserError(f"{val_json_file} has no category {missing[0]}; see --category_ids")
    annotations.without_unusable().require_annotations("give a val set that has some")
    unknown = np.flatnonzero(~np.isin(records.image_ids, annotations.image_ids))
    if len(unknown):
        image_id = records.image_ids[unknown[0]]
        reason = f"image {image_id} is not in {val_json_file}"
        if image_id < 0:
            reason = "no image/source_id, which the evaluation needs; convert the data set again"
        raise UserError(f"{records.where(unknown[0])}: {reason}")

    sizes = annotated_sizes(records, annotations)
    notes = annotations.lines()
    num_without_record = np.count_nonzero(~np.isin(annotations.image_ids, records.image_ids))
    if num_without_record:
        notes.append(
            f"{num_without_record} of {len(annotations)} images have no record: all their objects "
            "count as missed"
        )
    return replace(records, sizes=sizes), notes


def annotated_sizes(records: RecordIndex, annotations: CocoIndex) -> np.ndarray:
    """Return the (height, width) that the annotations have for each record's image, (R, 2) int64.

    All images must be among them. Raise UserError where a record says another size.
    """
    by_id = np.argsort(annotations.image_ids)
    positions = np.searchsorted(annotations.image_ids, records.image_ids, sorter=by_id)
    sizes = annotations.sizes[by_id[positions]].astype(np.int64)
    is_known = (records.sizes > 0).all(axis=1)
    differing = np.flatnonzero(is_known & (records.sizes != sizes).any(axis=1))
    if len(differing):
        first = differing[0]
        of_record = tuple(records.sizes[first].tolist())
        raise wrong_size(records.where(first), of_record, tuple(sizes[first].tolist()))
    return sizes


@torch.no_grad()
def detect_all(
    model: nn.Module,
    recipe: Recipe,
    records: RecordIndex,
    device: torch.device,
    ranks: Ranks,
    workers: int,
    precision: Precision | None = None,
) -> np.ndarray | None:
    """Detect on every record once, shared among the ranks.

    The network runs in fp32 unless another `precision` is given. Return the result rows of all
    ranks on the main one, None on the others.
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
    result_rows = []
    for rows in rows_of_batches:
        result_rows += rows
    return gather_result_rows(result_rows, ranks)


def rows_of_batch(
    started: Started, sizes: Tensor, image_ids: Tensor, recipe: Recipe, records: RecordIndex
) -> list[np.ndarray]:
    """Return the result rows of each image of a batch whose detection was started.

    `sizes` (N, 2) are their original (height, width) in pixels.
    """
    detections = finish_detect(started, sizes, recipe)
    result_rows = []
    for image_id, of_image in zip(image_ids.tolist(), detections, strict=True):
        result_rows.append(to_result_rows(image_id, *of_image, records.category_ids))
    return result_rows


def evaluate_and_save(
    result_rows: np.ndarray,
    records: RecordIndex,
    val_json_file: str,
    folder: Path,
    options: EvaluationOptions,
    log: Callable[[str], None],
    step: int | None = None,
    images_per_second: float | None = None,
) -> Evaluation:
    """Evaluate result rows, log the metrics, and save rows and metrics in `eval/`.

    `step` is that of a run, `images_per_second` the speed of detecting where it was measured; they
    are saved with the metrics. These are printed in the lines of the TensorFlow port, too.
    """
    evaluation = report_results(
        result_rows,
        val_json_file,
        len(records),
        folder / EVALUATION_FOLDER,
        options,
        log,
        records.class_names,
        step=step,
        images_per_second=images_per_second,
    )
    announce(f"Current AP: {evaluation.stats['AP']:.5f}")
    metrics = {PORT_NAMES[name]: value for name, value in evaluation.stats.items()}
    announce(f"Eval results: {metrics}")
    return evaluation


if __name__ == "__main__":
    entry.run(main)
