"""COCO evaluation of boxes: result rows, submission files, the 12 metrics, figures of each class.

A result row is [image_id, x, y, width, height, score, category_id] in float64, with the box in
pixels of the original image.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.coco.draw import MIN_SCORE
from common.coco.index import CocoIndex, read_annotations
from common.coco.matching import (
    NO_MATCH,
    RECALLS,
    Comparison,
    class_order,
    compare,
    confusion_matrix,
)
from common.errors import UserError
from common.files import write_atomically, write_figure

STATS = (
    "AP",
    "AP50",
    "AP75",
    "APsmall",
    "APmedium",
    "APlarge",
    "AR1",
    "AR10",
    "AR100",
    "ARsmall",
    "ARmedium",
    "ARlarge",
)
MMDET_NAMES = {
    "AP": "bbox_mAP",
    "AP50": "bbox_mAP_50",
    "AP75": "bbox_mAP_75",
    "APsmall": "bbox_mAP_s",
    "APmedium": "bbox_mAP_m",
    "APlarge": "bbox_mAP_l",
}
# Positions in the precision array of pycocotools, (IoU, recall, class, area range, max detections).
ALL_AREAS = 0
MAX_100_DETECTIONS = 2
# Positions among its IoU thresholds 0.50, 0.55, ... 0.95, and its recalls.
IOU_50 = 0
IOU_75 = 5
POINT_IOU = 0.5  # at which a detection of an operating point is right
ABSENT = -1.0  # in the place of a figure that there is no ground truth for


PR_CURVES_FILE = "pr_curves.png"
CONFUSION_FILE = "confusion.png"
DETECTIONS_FILE = "detections.png"
PICTURES = (DETECTIONS_FILE, PR_CURVES_FILE, CONFUSION_FILE)


class EvaluationOptions(NamedTuple):
    """How detections are evaluated and reported."""

    per_class: bool  # report the figures of every class
    faster: bool  # evaluate with faster-coco-eval instead of pycocotools
    analysis: bool = True  # explain what went wrong, of a run at its end
    table: bool = True  # log all twelve figures and where the detections are


class OperatingPoint(NamedTuple):
    """The score at which F1 is highest, and the figures of all detections from there, at IoU 0.5.

    The score is -1 where no detection is right; all is -1 where there is no ground truth.
    """

    score: float
    precision: float
    recall: float
    f1: float


class ClassMetrics(NamedTuple):
    """The figures of a class; -1 where it has no ground truth."""

    name: str
    ap: float
    ap50: float
    ar: float  # AR100
    num_boxes: int  # of the ground truth, without crowd regions
    best: OperatingPoint


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `evaluate`; a metric is -1 where the file has no ground truth for it."""

    stats: dict[str, float]  # keys of STATS
    text: str  # the 12 lines that pycocotools prints; a 13th where masks have no areas
    classes: list[ClassMetrics]  # by category id
    best: OperatingPoint  # of all classes together
    precision: np.ndarray  # (10 IoU thresholds, 101 recalls, classes) for all areas
    # (C + 1, C + 1) int64 [true, detected] of the detections from `shown_score` on; the last is
    # background: a missed box or a false detection
    confusion: np.ndarray
    folder: Path | None = None  # where its files are

    def pictures(self) -> list[Path]:
        """Return the pictures in its folder."""
        if self.folder is None:
            return []
        paths = [self.folder / name for name in PICTURES]
        return [path for path in paths if path.exists()]

    def mmdet(self) -> dict[str, float | str]:
        """Return the keys of MMDetection's log: 4 decimals, and 3 in the text to copy, as there."""
        entries = {}
        for stat, name in MMDET_NAMES.items():
            entries[name] = round(self.stats[stat], 4)
        copypaste = " ".join(f"{self.stats[stat]:.3f}" for stat in MMDET_NAMES)
        return {**entries, "bbox_mAP_copypaste": copypaste}


def shown_score(best_score: float) -> float:
    """Return the score from which detections count in pictures and in the analysis.

    It is the one with the best F1 of all classes, or MIN_SCORE where no detection is right.
    """
    return MIN_SCORE if best_score == ABSENT else best_score


def to_result_rows(image_id: int, boxes_xyxy, scores, labels, category_ids) -> np.ndarray:
    """Return the result rows (n, 7) of one image.

    boxes_xyxy (n, 4) pixels of the original image, scores (n,), labels (n,) 0-based. Classes that
    the annotation file does not have (category id -1) are left out.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(labels, dtype=np.int64)
    categories = np.asarray(category_ids)[labels]
    image_ids = np.full(len(boxes), image_id)
    corners = boxes[:, :2]
    sizes = boxes[:, 2:] - boxes[:, :2]
    result_rows = np.column_stack([image_ids, corners, sizes, scores, categories])
    return result_rows[categories >= 0]


def gather_result_rows(result_rows: Sequence[np.ndarray], ranks) -> np.ndarray | None:
    """Return all ranks' result rows by image id on rank 0; None on other ranks.

    result_rows: one array of `to_result_rows` for each image of this rank. An image that several
    have counts once.
    """
    gathered = ranks.all_gather_objects(result_rows)
    if not ranks.main:
        return None
    rows_of_image = {}
    for rows_of_rank in gathered:
        for rows in rows_of_rank:
            if len(rows):
                image_id = rows[0, 0]
                rows_of_image[image_id] = rows
    in_order = [rows_of_image[image_id] for image_id in sorted(rows_of_image)]
    return np.concatenate([np.empty((0, 7)), *in_order])


def save_results(path: Path, result_rows: np.ndarray) -> None:
    """Write result rows as a COCO submission file, atomically."""
    results = []
    for image_id, x, y, width, height, score, category_id in result_rows.tolist():
        results.append(
            {
                "image_id": int(image_id),
                "category_id": int(category_id),
                "bbox": [x, y, width, height],
                "score": score,
            }
        )
    write_atomically(path, json.dumps(results, allow_nan=False).encode())


def evaluate(
    annotation_file: str,
    result_rows: np.ndarray,
    faster: bool = False,
    classes: Sequence[str] | None = None,
) -> Evaluation:
    """Run COCO's evaluation of boxes; an image without a result row has no detections.

    `classes` are those that were detected (see `read_annotations`). faster: use faster-coco-eval,
    whose result is equal. Raise UserError for a broken annotation file, result rows of images or
    categories that it does not have, and an absent package.
    """
    coco_class, evaluator_class, summarize = _import_evaluator(faster)
    ground_truth = read_annotations(annotation_file, classes=classes)
    ground_truth.raise_errors()
    _require_known(result_rows, ground_truth)
    has_area = _has_mask_area(ground_truth.table.area)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        coco = coco_class()
        coco.dataset = _to_coco_dataset(ground_truth, has_area)
        coco.createIndex()
        detections = coco.loadRes(result_rows) if len(result_rows) else coco_class()
        evaluator = evaluator_class(coco, detections, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        summarize(evaluator)
    lines = printed.getvalue().splitlines()[-len(STATS) :]
    num_without_area = np.count_nonzero(~has_area)
    if num_without_area:
        lines.append(
            f"{num_without_area} of {len(has_area)} annotations of {annotation_file} have no mask "
            "area: AP and AR by size take the box's"
        )
    precision = evaluator.eval["precision"][..., ALL_AREAS, MAX_100_DETECTIONS]
    recall = evaluator.eval["recall"][..., ALL_AREAS, MAX_100_DETECTIONS]
    comparison = compare(ground_truth, result_rows, POINT_IOU, POINT_IOU)
    num_classes = len(ground_truth.class_names)
    points = operating_points(comparison, num_classes)
    return Evaluation(
        stats=dict(zip(STATS, evaluator.stats.tolist(), strict=True)),
        text="\n".join(lines),
        classes=_class_metrics(ground_truth, precision, recall, points.classes),
        best=points.pooled,
        precision=precision,
        confusion=confusion_matrix(
            comparison, shown_score(points.pooled.score), POINT_IOU, num_classes
        ),
    )


def require_evaluator(faster: bool) -> None:
    """Raise UserError where the package that `evaluate` needs is absent or broken."""
    _import_evaluator(faster)


def _import_evaluator(faster: bool):
    """Return the COCO class, the evaluator's class and the function that prints its result.

    pycocotools prints the result of both evaluators, so that the lines are the same.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if faster:
            from faster_coco_eval import COCOeval_faster

            return COCO, COCOeval_faster, COCOeval.summarize
    except ImportError as error:
        raise UserError(f"{error}; pip install pycocotools faster-coco-eval") from error
    except Exception as error:  # of compiled code that was built for another numpy
        raise UserError(
            f"pycocotools or faster-coco-eval cannot be imported ({type(error).__name__}: {error})",
            "pip install --force-reinstall pycocotools faster-coco-eval",
        ) from error
    return COCO, COCOeval, COCOeval.summarize


def _require_known(result_rows: np.ndarray, ground_truth: CocoIndex) -> None:
    """Raise UserError for a result row of an image or a category that the file does not have."""
    known_image = np.isin(result_rows[:, 0], ground_truth.image_ids)
    known_category = np.isin(result_rows[:, 6], ground_truth.category_ids)
    unknown = result_rows[~(known_image & known_category)]
    if len(unknown):
        image_id = unknown[0, 0]
        category_id = unknown[0, 6]
        raise UserError(
            f"{ground_truth.annotation_file} has no image {image_id:.0f} "
            f"or no category {category_id:.0f}"
        )


def _has_mask_area(area: np.ndarray) -> np.ndarray:
    """True for the annotations (A,) that have the area of a mask.

    MLPerf's slim files have no area, or 1.0 everywhere.
    """
    return np.isfinite(area) & ~np.all(area == 1)


def _to_coco_dataset(index: CocoIndex, has_area: np.ndarray) -> dict:
    """Return the ground truth as the dictionary that pycocotools reads from a file.

    The annotations are numbered anew from 1: a match with number 0 is no match to pycocotools.
    """
    table = index.table
    categories = np.array(index.category_ids)[table.label]
    widths = table.box_xywh[:, 2]
    heights = table.box_xywh[:, 3]
    areas = np.where(has_area, table.area, widths * heights)
    columns = {
        "id": np.arange(1, 1 + len(table)),
        "image_id": table.image_id,
        "category_id": categories,
        "bbox": table.box_xywh,
        "area": areas,
        "iscrowd": table.crowd.astype(int),
    }
    columns_as_lists = [column.tolist() for column in columns.values()]
    annotations = []
    for values in zip(*columns_as_lists, strict=True):
        annotations.append(dict(zip(columns, values, strict=True)))
    return {
        "images": [{"id": image_id} for image_id in index.image_ids.tolist()],
        "categories": [{"id": category_id} for category_id in index.category_ids],
        "annotations": annotations,
    }


class OperatingPoints(NamedTuple):
    """The best operating points of a set of detections."""

    classes: list[OperatingPoint]  # by category id
    pooled: OperatingPoint  # of all classes together


def operating_points(comparison: Comparison, num_classes: int) -> OperatingPoints:
    """Return the operating points with the highest F1, of each class and of all together.

    The matches are those of COCO's evaluation; faster-coco-eval does not give its own.
    """
    detected, boxes, _, matches = comparison
    counted = ~matches.ignored
    label = detected.label[counted]
    score = detected.score[counted]
    is_right = matches.box[counted] != NO_MATCH
    num_boxes = np.bincount(boxes.label[~boxes.crowd], minlength=num_classes)
    by_label = np.argsort(label, kind="stable")
    first = np.searchsorted(label[by_label], np.arange(num_classes + 1))
    classes = []
    for k in range(num_classes):
        of_class = by_label[first[k] : first[k + 1]]
        classes.append(best_point(score[of_class], is_right[of_class], int(num_boxes[k])))
    return OperatingPoints(classes, best_point(score, is_right, int(num_boxes.sum())))


def best_point(score: np.ndarray, is_right: np.ndarray, num_boxes: int) -> OperatingPoint:
    """Return the point with the highest F1 of detections, score and is_right (n,).

    Detections of one score stay together; of points with the same F1 the one with the highest
    score is taken.
    """
    if num_boxes == 0:
        return OperatingPoint(ABSENT, ABSENT, ABSENT, ABSENT)
    if not is_right.any():
        return OperatingPoint(ABSENT, 0.0, 0.0, 0.0)
    order = np.argsort(-score, kind="stable")
    score = score[order]
    is_last_of_score = np.append(score[1:] != score[:-1], True)
    num_right = np.cumsum(is_right[order])[is_last_of_score]
    num_detected = np.arange(1, 1 + len(score))[is_last_of_score]
    f1 = 2 * num_right / (num_detected + num_boxes)
    best = int(np.argmax(f1))
    return OperatingPoint(
        score=float(score[is_last_of_score][best]),
        precision=float(num_right[best] / num_detected[best]),
        recall=float(num_right[best] / num_boxes),
        f1=float(f1[best]),
    )


def _class_metrics(
    ground_truth: CocoIndex,
    precision: np.ndarray,
    recall: np.ndarray,
    points: list[OperatingPoint],
) -> list[ClassMetrics]:
    """Return the figures of every class by category id, which is the order of all arrays.

    precision (10 IoU thresholds, 101 recalls, C), recall (10 IoU thresholds, C).
    """
    counts = np.bincount(
        ground_truth.table.label[~ground_truth.table.crowd],
        minlength=len(ground_truth.class_names),
    )
    classes = []
    for k, label in enumerate(class_order(ground_truth).tolist()):
        classes.append(
            ClassMetrics(
                name=ground_truth.class_names[label],
                ap=float(precision[:, :, k].mean()),
                ap50=float(precision[IOU_50, :, k].mean()),
                ar=float(recall[:, k].mean()),
                num_boxes=int(counts[label]),
                best=points[k],
            )
        )
    return classes


def read_results(path: Path) -> np.ndarray:
    """Return the result rows (n, 7) of a COCO submission file."""
    result_rows = []
    for result in json.loads(path.read_bytes()):
        row = [result["image_id"], *result["bbox"], result["score"], result["category_id"]]
        result_rows.append(row)
    return np.array(result_rows, dtype=np.float64).reshape(-1, 7)


def draw_pr_curves(path: Path, evaluation: Evaluation) -> None:
    """Write a PNG of precision over recall, the mean of all classes that have ground truth."""
    from matplotlib.figure import Figure

    present = evaluation.precision[0, 0] > -1
    num_present = present.sum()
    # (10 IoU thresholds, 101 recalls); zeros where no class has ground truth.
    precision = evaluation.precision[..., present].sum(axis=2) / max(1, num_present)
    curves = {
        "AP50": precision[IOU_50],
        "AP75": precision[IOU_75],
        "AP": precision.mean(axis=0),
    }
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for stat, curve in curves.items():
        axes.plot(RECALLS, curve, label=f"{stat} {evaluation.stats[stat]:.3f}")
    # The same axes for every run, so that pictures compare.
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"mean of {num_present} classes")
    figure.legend(loc="outside lower center", ncols=len(curves))
    axes.grid(alpha=0.3)
    write_figure(path, figure, dots_per_inch=120)
