"""COCO evaluation of boxes: result rows, submission files, the 12 numbers, precision-recall curves.

A result row is [image_id, x, y, w, h, score, category_id] in float64, boxes in pixels.
"""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from common.coco.index import CocoIndex, read_annotations
from common.npu.errors import UserError
from common.npu.files import write_atomically

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MMDET = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")  # names of the first six


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found; -1 stands for "no ground truth of this kind"."""

    stats: dict[str, float]  # keys of STATS
    text: str  # the 12 lines that pycocotools prints
    notes: tuple[str, ...]  # remarks on the annotation file
    per_class: list[tuple[str, float]]  # name, AP; by category id
    precision: np.ndarray  # (10 IoU thresholds, 101 recalls, classes) for all areas

    def mmdet(self) -> dict[str, float | str]:
        """The keys of MMDetection's log, rounded to 3 decimals."""
        scores = [round(self.stats[key], 3) for key in STATS[: len(MMDET)]]
        numbers = {f"bbox_{name}": score for name, score in zip(MMDET, scores, strict=True)}
        return {**numbers, "bbox_mAP_copypaste": " ".join(f"{score:.3f}" for score in scores)}


def to_rows(
    image_id: int,
    boxes_xyxy: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    category_ids: Sequence[int],
) -> np.ndarray:
    """Result rows (n, 7) of one image; classes the file does not have (no id, or -1) are skipped.

    boxes_xyxy (n, 4) pixels of the original image, scores (n,), labels (n,) 0-based.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(labels, dtype=np.int64)
    known = np.flatnonzero(labels < len(category_ids))
    categories = np.asarray(category_ids, dtype=np.float64)[labels[known]]
    rows = np.empty((len(known), 7))
    rows[:, 0] = image_id
    rows[:, 1:3] = boxes[known, :2]
    rows[:, 3:5] = boxes[known, 2:] - boxes[known, :2]
    rows[:, 5] = np.asarray(scores)[known]
    rows[:, 6] = categories
    return rows[categories >= 0]


def gather_rows(rows: Sequence[np.ndarray], ranks) -> np.ndarray | None:
    """All ranks' rows by image id on rank 0 (None on the others), each image once.

    rows: one array of `to_rows` for each image this rank evaluated; repeats of an image, from
    padding to full batches, are dropped. ranks: `common.npu.distributed.Ranks`.
    """
    gathered = ranks.gather_objects(rows)
    if gathered is None:
        return None
    by_image: dict[float, np.ndarray] = {}
    for part in chain(*gathered):
        if len(part):
            by_image.setdefault(part[0, 0], part)
    return np.concatenate([np.empty((0, 7)), *(by_image[i] for i in sorted(by_image))])


def save_results(path: str | os.PathLike, rows: np.ndarray) -> None:
    """Write result rows as a COCO submission file, atomically."""
    results = [
        {"image_id": int(i), "category_id": int(c), "bbox": box, "score": score}
        for i, *box, score, c in rows.tolist()
    ]
    write_atomically(path, json.dumps(results, allow_nan=False).encode())


def evaluate(
    annotation_file: str,
    rows: np.ndarray,
    *,
    backend: str = "pycocotools",
    max_dets: tuple[int, int, int] = (1, 10, 100),
) -> Evaluation:
    """COCO's bbox evaluation of result rows; images without a row count as without detections.

    backend: "pycocotools" or "faster" (faster-coco-eval), of equal result. max_dets: of the three
    ARs; AP is taken at 100, which must be among them. Raises UserError for a broken annotation
    file, rows that do not belong to it, or an absent backend.
    """
    coco_class, eval_class, summarize = _backend(backend)
    truth = read_annotations(annotation_file)
    truth.raise_errors()
    rows = np.asarray(rows, dtype=np.float64).reshape(-1, 7)
    if not np.isfinite(rows).all():
        raise ValueError("result rows must be finite")
    image_ids, boxes, scores, category_ids = rows[:, 0], rows[:, 1:5], rows[:, 5], rows[:, 6]
    for what, ids, known in (
        ("image", image_ids, truth.image_ids),
        ("category", category_ids, truth.category_ids),
    ):
        foreign = np.setdiff1d(ids, known)
        if foreign.size:
            raise UserError(
                f"{annotation_file}: has no {what} {foreign[0]:.0f}; "
                "evaluate against the annotation file of the images that were detected on"
            )

    table, notes = truth.table, ()
    box_areas = table.box_xywh[:, 2:].prod(axis=1)
    # MLPerf's slim files have no area, or 1.0 everywhere.
    real = np.isfinite(table.area) & ~np.all(table.area == 1)
    if not real.all():
        notes = (f"{annotation_file} has no mask areas: AP and AR by size go by the boxes' areas",)
    objects = {
        "image_id": table.image_id,
        "category_id": np.asarray(truth.category_ids)[table.label],
        "bbox": table.box_xywh,
        "area": np.where(real, table.area, box_areas),
        "iscrowd": table.crowd.astype(int),
    }
    detections = {
        "image_id": image_ids.astype(int),
        "category_id": category_ids.astype(int),
        "bbox": boxes,
        "area": boxes[:, 2:].prod(axis=1),
        "iscrowd": np.zeros(len(rows), dtype=int),
        "score": scores,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        sides = (_coco(coco_class, truth, columns) for columns in (objects, detections))
        run = eval_class(*sides, "bbox")
        run.params.maxDets = list(max_dets)
        run.evaluate()
        run.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        summarize(run)
    precision = run.eval["precision"][..., 0, 2]  # of (IoU, recall, class, area, max_dets)
    names = [name for _, name in sorted(zip(truth.category_ids, truth.class_names, strict=True))]
    return Evaluation(
        stats=dict(zip(STATS, run.stats.tolist(), strict=True)),
        text=printed.getvalue().rstrip("\n"),
        notes=notes,
        per_class=list(zip(names, precision.mean(axis=(0, 1)).tolist(), strict=True)),
        precision=precision,
    )


def _backend(name: str) -> tuple:
    """Classes of the data set and of the evaluation, and what sums an evaluation up."""
    if name not in ("pycocotools", "faster"):
        raise ValueError(f'backend must be "pycocotools" or "faster", not {name!r}')
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if name == "pycocotools":
            return COCO, COCOeval, COCOeval.summarize
        import faster_coco_eval as faster
    except ImportError as error:
        package = "pycocotools" if "pycocotools" in str(error) else "faster-coco-eval"
        raise UserError(f"evaluation needs {package}: pip install {package}") from error
    return faster.COCO, faster.COCOeval_faster, COCOeval.summarize


def _coco(coco_class: type, truth: CocoIndex, columns: dict[str, np.ndarray]):
    """A data set of the images and categories of `truth` with the annotations in `columns`."""
    # Numbered from 1: a match with annotation 0 is no match to pycocotools.
    columns = {"id": np.arange(1, len(columns["bbox"]) + 1), **columns}
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    coco = coco_class()
    coco.dataset = {
        "images": [{"id": i} for i in truth.image_ids.tolist()],
        "categories": [{"id": i} for i in truth.category_ids],
        "annotations": [dict(zip(columns, row, strict=True)) for row in values],
    }
    coco.createIndex()
    return coco


def draw_pr_curves(path: str | os.PathLike, evaluation: Evaluation) -> None:
    """Write a PNG of precision over recall, the mean of all classes that have ground truth."""
    from matplotlib.figure import Figure

    precision = evaluation.precision[:, :, evaluation.precision[0, 0] > -1]
    axes = (figure := Figure(figsize=(6, 5), layout="constrained")).subplots()
    curves = {"IoU 0.50": precision[:1], "IoU 0.75": precision[5:6], "IoU 0.50:0.95": precision}
    for (label, curve), key in zip(curves.items(), ("AP50", "AP75", "AP"), strict=True):
        if curve.size:
            label = f"{label}  {key} {evaluation.stats[key]:.3f}"
            axes.plot(np.linspace(0, 1, curve.shape[1]), curve.mean(axis=(0, 2)), label=label)
            axes.legend(loc="lower left")
    title = f"mean of {precision.shape[2]} classes"
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    figure.savefig(picture := io.BytesIO(), format="png", dpi=120)
    write_atomically(path, picture.getvalue())
