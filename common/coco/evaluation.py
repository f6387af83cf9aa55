"""COCO evaluation of boxes: result rows, submission files, the 12 numbers, precision-recall curves.

A result row is [image_id, x, y, w, h, score, category_id] in float64, boxes in pixels.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.coco.check import Annotations, DataReport, read_annotations
from common.npu.errors import UserError

SUMMARY = {  # key: position of the IoU threshold (None: all), area range, position in max_dets
    "AP": (None, "all", 2),
    "AP50": (0, "all", 2),
    "AP75": (5, "all", 2),
    "APs": (None, "small", 2),
    "APm": (None, "medium", 2),
    "APl": (None, "large", 2),
    "AR1": (None, "all", 0),
    "AR10": (None, "all", 1),
    "AR100": (None, "all", 2),
    "ARs": (None, "small", 2),
    "ARm": (None, "medium", 2),
    "ARl": (None, "large", 2),
}
AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found; -1 stands for "no ground truth of this kind"."""

    stats: dict[str, float]  # keys of SUMMARY
    text: str  # the 12 lines that pycocotools prints
    notes: tuple[str, ...]  # remarks on the annotation file
    per_class: list[tuple[str, float]]  # name, AP; by category id
    precision: np.ndarray  # (10 IoU thresholds, 101 recalls, classes) for all areas

    def mmdet(self) -> dict[str, float | str]:
        """The keys of MMDetection's log, rounded to 3 decimals."""
        keys = {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75"}
        keys |= {"mAP_s": "APs", "mAP_m": "APm", "mAP_l": "APl"}
        numbers = {f"bbox_{name}": round(self.stats[key], 3) for name, key in keys.items()}
        together = " ".join(f"{value:.3f}" for value in numbers.values())
        return {**numbers, "bbox_mAP_copypaste": together}


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
    gathered = ranks.gather_objects(_each_image_once(rows))
    if gathered is None:
        return None
    merged = _each_image_once(gathered)
    return merged[np.argsort(merged[:, 0], kind="stable")]


def _each_image_once(parts: Sequence[np.ndarray]) -> np.ndarray:
    first: dict[float, np.ndarray] = {}
    for part in parts:
        for block in np.split(part, np.flatnonzero(np.diff(part[:, 0])) + 1):
            if len(block):
                first.setdefault(float(block[0, 0]), block)
    return np.concatenate([np.empty((0, 7)), *first.values()])


def save_results(path: str | os.PathLike, rows: np.ndarray) -> None:
    """Write result rows as a COCO submission file, atomically."""
    results = [
        {"image_id": int(i), "category_id": int(c), "bbox": box, "score": score}
        for i, *box, score, c in rows.tolist()
    ]
    _write(path, lambda partial: partial.write_text(json.dumps(results, allow_nan=False)))


def _write(path: str | os.PathLike, save: Callable[[Path], object]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def evaluate(
    annotation_file: str,
    rows: np.ndarray,
    *,
    backend: str = "pycocotools",
    image_ids: Sequence[int] | None = None,
    max_dets: tuple[int, int, int] = (1, 10, 100),
) -> Evaluation:
    """COCO's bbox evaluation of result rows, on `image_ids` only where given.

    backend: "pycocotools" or "faster" (faster-coco-eval), of equal result. Raises UserError for a
    broken annotation file, rows that do not belong to it, or an absent backend.
    """
    coco_class, eval_class = _backend(backend)
    report = DataReport()
    truth = read_annotations(annotation_file, report)
    report.raise_errors(annotation_file)
    rows = np.asarray(rows, dtype=np.float64).reshape(-1, 7)
    if not np.isfinite(rows).all():
        raise ValueError("result rows must be finite")
    for what, ids, known in (
        ("image", rows[:, 0], truth.image_ids),
        ("category", rows[:, 6], truth.category_ids),
        ("image", [] if image_ids is None else image_ids, truth.image_ids),
    ):
        foreign = np.setdiff1d(ids, known)
        if foreign.size:
            raise UserError(
                f"{annotation_file}: has no {what} {foreign[0]:.0f}; "
                "evaluate against the annotation file of the images that were detected on"
            )

    table, notes = truth.table[truth.table["image"] >= 0], ()
    boxes, areas = table["box_xywh"], table["area"]
    # MLPerf's slim files have no area, or 1.0 everywhere.
    real = np.isfinite(areas) & ~np.all(areas == 1)
    if not real.all():
        notes = (f"{annotation_file} has no mask areas: AP and AR by size go by the boxes' areas",)
    objects = _records(
        truth.image_ids[table["image"]],
        np.asarray(truth.category_ids)[table["category"]],
        boxes,
        area=np.where(real, areas, boxes[:, 2] * boxes[:, 3]),
        iscrowd=table["crowd"].astype(int),
    )
    detections = _records(
        rows[:, 0].astype(int),
        rows[:, 6].astype(int),
        rows[:, 1:5],
        area=rows[:, 3] * rows[:, 4],
        iscrowd=np.zeros(len(rows), dtype=int),
        score=rows[:, 5],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run = eval_class(
            *(_coco(coco_class, truth, side) for side in (objects, detections)), "bbox"
        )
        run.params.maxDets = list(max_dets)
        if image_ids is not None:
            run.params.imgIds = [int(i) for i in image_ids]
        run.evaluate()
        run.accumulate()
    return _summarize(truth, notes, run.params.maxDets, run.eval["precision"], run.eval["recall"])


def _backend(name: str) -> tuple[type, type]:
    try:
        if name == "pycocotools":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        elif name == "faster":
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval
        else:
            raise ValueError(f'backend must be "pycocotools" or "faster", not {name!r}')
    except ImportError as error:
        package = "pycocotools" if name == "pycocotools" else "faster-coco-eval"
        raise UserError(f"evaluation needs {package}: pip install {package}") from error
    return COCO, COCOeval


def _records(image_ids, category_ids, boxes_xywh, **columns: np.ndarray) -> list[dict]:
    # Numbered from 1: a match with annotation 0 is no match to pycocotools.
    columns = {"image_id": image_ids, "category_id": category_ids, "bbox": boxes_xywh, **columns}
    columns["id"] = np.arange(1, len(image_ids) + 1)
    lists = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def _coco(coco_class: type, truth: Annotations, records: list[dict]):
    coco = coco_class()
    coco.dataset = {
        "images": [{"id": i} for i in truth.image_ids.tolist()],
        "categories": [{"id": i} for i in truth.category_ids],
        "annotations": records,
    }
    coco.createIndex()
    return coco


def _summarize(truth, notes, max_dets, precision, recall) -> Evaluation:
    """The 12 numbers of precision (T, R, K, A, M) and recall (T, K, A, M), K by category id."""
    stats, lines = {}, []
    for key, (threshold, area, dets) in SUMMARY.items():
        values = precision if key.startswith("AP") else recall
        thresholds = slice(None) if threshold is None else slice(threshold, threshold + 1)
        stats[key] = _mean(values[thresholds, ..., AREAS.index(area), dets])
        kind = "Average Precision  (AP)" if key.startswith("AP") else "Average Recall     (AR)"
        iou = "0.50:0.95" if threshold is None else f"{0.5 + 0.05 * threshold:.2f}"
        lines.append(
            f" {kind} @[ IoU={iou:<9} | area={area:>6s} | maxDets={max_dets[dets]:>3d} ]"
            f" = {stats[key]:.3f}"
        )
    overall = precision[..., 0, 2]
    names = [name for _, name in sorted(zip(truth.category_ids, truth.class_names, strict=True))]
    per_class = [(name, _mean(overall[:, :, k])) for k, name in enumerate(names)]
    return Evaluation(stats, "\n".join(lines), notes, per_class, overall)


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


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
    _write(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
