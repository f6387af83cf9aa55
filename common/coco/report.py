"""The report of an evaluation: metrics in the log, results and pictures in the output folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.coco.draw import Example, draw_sheet
from common.coco.error_pictures import draw_confusion
from common.coco.evaluation import (
    CONFUSION_FILE,
    POINT_IOU,
    PR_CURVES_FILE,
    ClassMetrics,
    Evaluation,
    EvaluationOptions,
    draw_pr_curves,
    evaluate,
    save_results,
    shown_score,
)
from common.coco.images import ImageReader, turned_images_line
from common.coco.index import CocoIndex
from common.coco.metrics import METRICS_FILE, PR_CURVES_JSON, save_curves, save_metrics
from common.files import HeldBackErrors
from common.npu.distributed import Ranks

RESULTS_FILE = "results.bbox.json"  # in COCO's submission format


def report_results(
    result_rows: np.ndarray,
    annotation_file: str,
    num_images: int,
    folder: Path,
    options: EvaluationOptions,
    log: Callable[[str], None],
    classes: Sequence[str] | None = None,
    goal: float | None = None,
    step: int | None = None,
    images_per_second: float | None = None,
) -> Evaluation:
    """Evaluate result rows, log the metrics, and save rows, metrics and pictures in the folder.

    `classes` are those that were detected. With a `goal`, an AP or 0 for none, the line that users
    of the ports look for is logged as well. `step` is that of the run and `images_per_second` the
    speed of the evaluation, for the file of metrics. The rows are saved first, so that they are
    there if the evaluation fails. Raise UserError as `evaluate` does; that a file cannot be written
    is raised after the metrics were logged.
    """
    errors = HeldBackErrors()
    results_path = folder / RESULTS_FILE
    with errors.hold_back():
        save_results(results_path, result_rows)
    evaluation = evaluate(annotation_file, result_rows, options.faster, classes)
    if options.table:
        count = f"{len(result_rows)} detections in {num_images} images"
        log(f"{evaluation.text}\n{count}: {results_path}")
    if options.per_class:
        log(per_class_lines(evaluation))
    if goal is not None:
        log(current_ap_line(evaluation, goal))
    with errors.hold_back():
        save_metrics(folder / METRICS_FILE, evaluation, num_images, step, images_per_second)
    with errors.hold_back():
        draw_pr_curves(folder / PR_CURVES_FILE, evaluation)
    with errors.hold_back():
        draw_confusion(
            folder / CONFUSION_FILE,
            evaluation.confusion,
            [metrics.name for metrics in evaluation.classes],
            shown_score(evaluation.best.score),
            POINT_IOU,
        )
    with errors.hold_back():
        save_curves(folder / PR_CURVES_JSON, evaluation)
    errors.raise_first()
    return replace(evaluation, folder=folder)


def current_ap_line(evaluation: Evaluation, goal: float) -> str:
    """Return the line of the ports with the AP, and with the goal unless it is 0."""
    line = f"Current AP: {evaluation.stats['AP']:.5f}"
    if goal:
        line += f" AP goal: {goal:.5f}"
    return line


def turned_images(reader: ImageReader, num_images: int, ranks: Ranks) -> list[str]:
    """Return a line on the images that were turned so far, none where there are none.

    The set has `num_images`; a rank's reader has all of them or the rank's share. All ranks must
    call it.
    """
    ids_of_rank = reader.records.image_ids[reader.is_turned].tolist()
    turned_ids = set()
    for ids in ranks.all_gather_objects(ids_of_rank):
        turned_ids.update(ids)
    if not turned_ids:
        return []
    return [turned_images_line(len(turned_ids), num_images)]


def per_class_lines(evaluation: Evaluation) -> str:
    """Return the figures of every class as a table: the highest AP first, without AP last.

    The last three columns are those of the score with the best F1, at IoU 0.5.
    """
    by_ap = sorted(evaluation.classes, key=lambda metrics: -metrics.ap)
    width = max(len("class"), *(len(metrics.name) for metrics in by_ap))
    heads = ("boxes", "AP", "AP50", "AR100", "score", "precision", "recall")
    lines = [f"{'class':<{width}}" + "".join(f"{head:>10}" for head in heads)]
    for metrics in by_ap:
        lines.append(f"{metrics.name:<{width}}" + _class_columns(metrics))
    return "\n".join(lines)


def _class_columns(metrics: ClassMetrics) -> str:
    """Return the columns of a class; a figure that there is not is a dash."""
    best = metrics.best
    figures = (metrics.ap, metrics.ap50, metrics.ar, best.score, best.precision, best.recall)
    texts = [f"{figure:.3f}" if figure >= 0 else "-" for figure in figures]
    return f"{metrics.num_boxes:>10}" + "".join(f"{text:>10}" for text in texts)


def draw_examples(
    path: Path,
    records: CocoIndex,
    result_rows: np.ndarray,
    turns_if_both_fit: bool,
    count: int = 8,
) -> None:
    """Write a picture of up to `count` images, spread over the set: ground truth and detections.

    Images without ground truth are taken only where no image has any. `turns_if_both_fit` as in
    ImageReader.
    """
    candidates = np.flatnonzero(np.diff(records.offsets))
    if len(candidates) == 0:
        candidates = np.arange(len(records))
    label_of = {category_id: label for label, category_id in enumerate(records.category_ids)}
    reader = ImageReader(records, turns_if_both_fit)
    examples = []
    for i in candidates[spread_over(len(candidates), count)]:
        ground_truth = records.annotations(i)
        rows = result_rows[result_rows[:, 0] == records.image_ids[i]]
        labels = [label_of[category_id] for category_id in rows[:, 6]]
        examples.append(
            Example(
                image=reader.read(i),
                gt_boxes_xyxy=to_xyxy(ground_truth.box_xywh),
                gt_labels=ground_truth.label,
                boxes_xyxy=to_xyxy(rows[:, 1:5]),
                labels=np.array(labels, np.int64),
                scores=rows[:, 5],
            )
        )
    draw_sheet(path, examples, records.class_names)


def image_by_id(records: CocoIndex, turns_if_both_fit: bool) -> Callable[[int], np.ndarray | None]:
    """Return the function that reads the image (H, W, 3) uint8 RGB of an id; None for another's."""
    reader = ImageReader(records, turns_if_both_fit)
    position_of = {image_id: i for i, image_id in enumerate(records.image_ids.tolist())}

    def read(image_id: int) -> np.ndarray | None:
        if image_id not in position_of:
            return None
        return reader.read(position_of[image_id])

    return read


def example_images(records: CocoIndex, turns_if_both_fit: bool) -> list[np.ndarray]:
    """Return a few images (H, W, 3) uint8 RGB, spread over the set."""
    reader = ImageReader(records, turns_if_both_fit)
    return [reader.read(i) for i in spread_over(len(records))]


def spread_over(count: int, examples: int = 16) -> list[int]:
    """Return up to `examples` of the positions below `count`, evenly spread."""
    spread = np.linspace(0, count - 1, examples, dtype=int)
    return np.unique(spread).tolist()


def to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """Convert boxes (n, 4) from corner and size to two corners."""
    corners = boxes_xywh[:, :2]
    sizes = boxes_xywh[:, 2:]
    return np.concatenate([corners, corners + sizes], axis=1)
