"""COCO evaluation of boxes: result rows, submission files, the 12 numbers, precision-recall curves.

A result row is [image_id, x, y, w, h, score, category_id] in float64, boxes in pixels.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.coco.index import read_annotations
from common.errors import UserError
from common.files import write_atomically

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MMDET = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")  # names of the first six


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found; -1 stands for "no ground truth of this kind"."""

    stats: dict[str, float]  # keys of STATS
    text: str  # the 12 lines that pycocotools prints; a 13th where masks have no areas
    per_class: list[tuple[str, float]]  # name, AP; by category id
    precision: np.ndarray  # (10 IoU thresholds, 101 recalls, classes) for all areas

    def mmdet(self) -> dict[str, float | str]:
        """The keys of MMDetection's log, rounded to 3 decimals."""
        scores = zip(MMDET, self.stats.values(), strict=False)
        log = {f"bbox_{name}": round(score, 3) for name, score in scores}
        return {**log, "bbox_mAP_copypaste": " ".join(f"{score:.3f}" for score in log.values())}


def to_rows(image_id: int, boxes_xyxy, scores, labels, category_ids) -> np.ndarray:
    """Result rows (n, 7) of one image; classes that the file does not have (id -1) are skipped.

    boxes_xyxy (n, 4) pixels of the original image, scores (n,), labels (n,) 0-based.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    categories = np.asarray(category_ids)[np.asarray(labels, dtype=np.int64)]
    image_ids, sizes = np.full(len(boxes), image_id), boxes[:, 2:] - boxes[:, :2]
    rows = np.column_stack([image_ids, boxes[:, :2], sizes, scores, categories])
    return rows[categories >= 0]


def gather_rows(rows: Sequence[np.ndarray], ranks) -> np.ndarray | None:
    """All ranks' rows by image id on rank 0 (None on the others), each image once.

    rows: one array of `to_rows` for each image of this rank, which may repeat images of others.
    """
    gathered = ranks.all_gather_objects(rows)
    if not ranks.main:
        return None
    by_image = {part[0, 0]: part for rank in gathered for part in rank if len(part)}
    return np.concatenate([np.empty((0, 7)), *(by_image[i] for i in sorted(by_image))])


def save_results(path: Path, rows: np.ndarray) -> None:
    """Write result rows as a COCO submission file, atomically."""
    results = [
        {"image_id": int(i), "category_id": int(c), "bbox": box, "score": score}
        for i, *box, score, c in rows.tolist()
    ]
    write_atomically(path, json.dumps(results, allow_nan=False).encode())


def evaluate(annotation_file: str, rows: np.ndarray, faster: bool = False) -> Evaluation:
    """COCO's bbox evaluation of result rows; images without a row count as without detections.

    faster: by faster-coco-eval, of equal result. Raises UserError for a broken annotation file,
    rows of images or categories that it does not have, or an absent package.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if faster:
            from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        raise UserError(f"{error}; pip install pycocotools faster-coco-eval") from error
    truth = read_annotations(annotation_file)
    truth.raise_errors()
    known = np.isin(rows[:, 0], truth.image_ids) & np.isin(rows[:, 6], truth.category_ids)
    if not known.all():
        image, *_, category = rows[~known][0]
        raise UserError(f"{annotation_file} has no image {image:.0f} or no category {category:.0f}")

    table = truth.table
    # MLPerf's slim files have no area, or 1.0 everywhere.
    real = np.isfinite(table.area) & ~np.all(table.area == 1)
    columns = {
        "id": np.arange(1, 1 + len(table)),  # a match with number 0 is no match to pycocotools
        "image_id": table.image_id,
        "category_id": np.array(truth.category_ids)[table.label],
        "bbox": table.box_xywh,
        "area": np.where(real, table.area, table.box_xywh[:, 2:].prod(axis=1)),
        "iscrowd": table.crowd.astype(int),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in truth.image_ids.tolist()],
        "categories": [{"id": i} for i in truth.category_ids],
        "annotations": [dict(zip(columns, row, strict=True)) for row in values],
    }
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        coco.createIndex()
        detected = coco.loadRes(rows) if len(rows) else COCO()
        run = (COCOeval_faster if faster else COCOeval)(coco, detected, "bbox")
        run.evaluate()
        run.accumulate()
        COCOeval.summarize(run)
    stats = dict(zip(STATS, run.stats.tolist(), strict=True))
    text = "\n".join(printed.getvalue().splitlines()[-len(STATS) :])
    if not real.all():
        text += f"\n{annotation_file} has no mask areas: AP and AR by size go by the boxes' areas"
    precision = run.eval["precision"][..., 0, 2]  # of (IoU, recall, class, area, max_dets)
    names = [name for _, name in sorted(zip(truth.category_ids, truth.class_names, strict=True))]
    per_class = list(zip(names, precision.mean(axis=(0, 1)).tolist(), strict=True))
    return Evaluation(stats, text, per_class, precision)


def draw_pr_curves(path: Path, evaluation: Evaluation) -> None:
    """Write a PNG of precision over recall, the mean of all classes that have ground truth."""
    from matplotlib.figure import Figure

    present = evaluation.precision[0, 0] > -1
    curves = evaluation.precision[..., present].sum(axis=2) / max(1, present.sum())
    curves = {"AP50": curves[0], "AP75": curves[5], "AP": curves.mean(axis=0)}
    axes = (figure := Figure(figsize=(6, 5), layout="constrained")).subplots()
    for key, curve in curves.items():
        axes.plot(np.linspace(0, 1, 101), curve, label=f"{key} {evaluation.stats[key]:.3f}")
    axes.set(xlabel="recall", ylabel="precision", title=f"mean of {present.sum()} classes")
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    figure.savefig(picture := io.BytesIO(), format="png", dpi=120)
    write_atomically(path, picture.getvalue())
