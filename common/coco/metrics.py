"""Files with the figures of an evaluation: `metrics.json`, which others read, and its curves."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.coco.evaluation import ABSENT, IOU_50, ClassMetrics, Evaluation, OperatingPoint
from common.errors import UserError
from common.files import write_atomically

METRICS_FILE = "metrics.json"
PR_CURVES_JSON = "pr_curves.json"
MEAN_OF_CLASSES = "mean of all classes"  # in the place of a class's name
BENCHMARK = "benchmark"  # the key of what `evaluate.py --benchmark` measured
BEST = "best"  # in the place of a lowest score: of each class the one with the best F1


def save_metrics(
    path: Path,
    evaluation: Evaluation,
    num_images: int,
    step: int | None = None,
    images_per_second: float | None = None,
) -> None:
    """Write the figures of an evaluation as JSON, atomically.

    First are the 12 metrics by name and in a run the step, counted from 1. `images_per_second` is
    the speed of the evaluation where it was measured. What a benchmark has added to the file stays.
    """
    metrics: dict[str, object] = dict(evaluation.stats)
    if step is not None:
        metrics["step"] = step
    metrics["images"] = num_images
    if images_per_second is not None:
        metrics["speed"] = round(images_per_second, 2)
    metrics["best_f1"] = evaluation.best._asdict()
    metrics["classes"] = [class_entry(of_class) for of_class in evaluation.classes]
    before = read_metrics(path)
    if BENCHMARK in before:
        metrics[BENCHMARK] = before[BENCHMARK]
    _write(path, metrics)


def class_entry(metrics: ClassMetrics) -> dict[str, object]:
    """Return the figures of a class as they are in the file."""
    return {
        "name": metrics.name,
        "AP": metrics.ap,
        "AP50": metrics.ap50,
        "AR": metrics.ar,
        "boxes": metrics.num_boxes,
        "best_f1": metrics.best._asdict(),
    }


def save_curves(path: Path, evaluation: Evaluation) -> None:
    """Write the precision-recall curves of each class as JSON, atomically."""
    write_atomically(path, json.dumps(curves_of_classes(evaluation)).encode())


def curves_of_classes(evaluation: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Return the precision at 101 recalls, of the mean and of each class with ground truth.

    "AP50" is at IoU 0.50, "AP" the mean over the IoU thresholds.
    """
    is_present = evaluation.precision[0, 0] > -1
    curves = {}
    if is_present.any():
        curves[MEAN_OF_CLASSES] = pr_curve(evaluation.precision[..., is_present].mean(axis=2))
    for k in np.flatnonzero(is_present):
        curves[evaluation.classes[k].name] = pr_curve(evaluation.precision[..., k])
    return curves


def pr_curve(precision: np.ndarray) -> dict[str, list[float]]:
    """Return the curves of one class, precision (10 IoU thresholds, 101 recalls)."""
    curves = {"AP50": precision[IOU_50], "AP": precision.mean(axis=0)}
    return {name: curve.round(3).tolist() for name, curve in curves.items()}


def add_to_metrics(path: Path, name: str, value: object) -> None:
    """Put one entry into the file, which is made where it is missing; the others stay."""
    metrics = read_metrics(path)
    metrics[name] = value
    _write(path, metrics)


def read_metrics(path: Path) -> dict:
    """Return what the file holds, nothing where there is none or it is not JSON."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, metrics: dict) -> None:
    write_atomically(path, (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode())


def lowest_scores(
    min_score: float | str,
    checkpoint_path: str | Path,
    class_names: Sequence[str],
    folder: str = "",
) -> list[float]:
    """Return the lowest score of each class from which detections are shown.

    `min_score` is a number for all, or BEST: the scores with the best F1 that the `metrics.json`
    beside the checkpoint has, or that in a `folder` beside it. A class without one has that of all
    classes together. Raise UserError where there is no such file, or none of these classes.
    """
    if min_score != BEST:
        return [float(min_score)] * len(class_names)
    path = Path(checkpoint_path).parent / folder / METRICS_FILE
    metrics = read_metrics(path)
    folder_of_file = Path(checkpoint_path).parent
    remedy = (
        f"evaluate the checkpoint with --output_dir={folder_of_file}, which writes it, or give a "
        "number as the lowest score"
    )
    if "best_f1" not in metrics or "classes" not in metrics:
        raise UserError(f"no {path} with the scores of the best F1", remedy)
    points = {entry["name"]: OperatingPoint(**entry["best_f1"]) for entry in metrics["classes"]}
    missing = [name for name in class_names if name not in points]
    if missing:
        raise UserError(
            f"scores of the best F1: {path} is of another detector: no class {missing[0]!r}", remedy
        )
    pooled = OperatingPoint(**metrics["best_f1"])
    if pooled.score == ABSENT:
        raise UserError(
            f"scores of the best F1: {path}: no detection was right",
            "give a number as the lowest score",
        )
    scores = []
    for name in class_names:
        score = points[name].score
        scores.append(pooled.score if score == ABSENT else score)
    return scores
