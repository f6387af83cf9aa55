"""The report on what went wrong in an evaluation: `analysis.json`, pictures, suspect labels."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.coco.analysis import (
    ERROR_TYPES,
    NOT_FOUND,
    Analysis,
    Suspect,
    analyse,
    errors_of_image,
)
from common.coco.error_pictures import (
    BACKGROUND_NAME,
    WorstExample,
    draw_errors,
    draw_suspects,
    draw_worst_images,
)
from common.coco.evaluation import CONFUSION_FILE, read_results, shown_score
from common.coco.index import CocoIndex, name_from_bytes, read_annotations
from common.coco.metrics import METRICS_FILE, read_metrics
from common.coco.report import RESULTS_FILE
from common.errors import UserError, one_line
from common.files import encoded, write_atomically

ANALYSIS_FILE = "analysis.json"
ERRORS_FILE = "errors.png"
WORST_IMAGES_FILE = "worst_images.png"
SUSPECTS_FILE = "suspect_labels.json"
SUSPECTS_PICTURE = "suspect_labels.png"
WORST_IMAGES_DRAWN = 8

ReadImage = Callable[[int], np.ndarray | None]


def write_analysis(
    folder: Path,
    annotation_file: str,
    class_names: Sequence[str],
    read_image: ReadImage,
    log: Callable[[str], None],
) -> Analysis:
    """Explain the evaluation whose results, metrics and pictures are in the folder; log it.

    `class_names` are those that were detected. `read_image` returns the image (H, W, 3) uint8 RGB
    of an id, or None where the data set has none; one that cannot be read is logged and not drawn.
    Pictures that there is nothing for are removed: they would be those of another evaluation.
    """
    read_image = _with_errors_logged(read_image, log)
    ground_truth = read_annotations(annotation_file, classes=class_names)
    result_rows = read_results(folder / RESULTS_FILE)
    score = shown_score(read_metrics(folder / METRICS_FILE)["best_f1"]["score"])
    analysis = analyse(ground_truth, result_rows, score)
    _write_json(folder / ANALYSIS_FILE, analysis_entries(analysis))
    _write_json(folder / SUSPECTS_FILE, suspects_in_coco_format(analysis.suspects, ground_truth))
    log(dominant_error(analysis))
    draw_errors(folder / ERRORS_FILE, analysis)
    log(f"{folder / ERRORS_FILE}: what each type of error costs")
    log(f"{folder / CONFUSION_FILE}: what each class was detected as")
    examples = _worst_examples(analysis, ground_truth, result_rows, read_image)
    _write_worst_images(folder / WORST_IMAGES_FILE, analysis, examples, log)
    _write_suspects(folder, analysis, read_image, log)
    return analysis


def _with_errors_logged(read_image: ReadImage, log: Callable[[str], None]) -> ReadImage:
    """Return the function that logs the error of an image, once, and returns None for it."""
    unreadable = set()

    def read(image_id: int) -> np.ndarray | None:
        if image_id in unreadable:
            return None
        try:
            return read_image(image_id)
        except UserError as error:
            unreadable.add(image_id)
            log(f"not drawn: {one_line(error)}")
            return None

    return read


def _write_json(path: Path, content: dict) -> None:
    write_atomically(path, encoded(json.dumps(content, ensure_ascii=False) + "\n"))


def _worst_examples(
    analysis: Analysis, ground_truth: CocoIndex, result_rows: np.ndarray, read_image: ReadImage
) -> list[WorstExample]:
    """Return the worst images that are there, with their errors."""
    examples = []
    for worst in analysis.worst_images:
        if len(examples) == WORST_IMAGES_DRAWN:
            break
        image = read_image(worst.image_id)
        if image is not None:
            errors = errors_of_image(ground_truth, result_rows, worst.image_id, analysis.score)
            examples.append(WorstExample(worst.file_name, image, errors))
    return examples


def _write_worst_images(
    path: Path, analysis: Analysis, examples: list[WorstExample], log: Callable[[str], None]
) -> None:
    if not examples:
        path.unlink(missing_ok=True)
        return
    draw_worst_images(path, examples, analysis.score)
    first = examples[0]
    log(
        f"{path}: the images with most errors; {first.file_name} has "
        f"{first.errors.is_missed.sum()} missed and {first.errors.is_false.sum()} false"
    )


def _write_suspects(
    folder: Path, analysis: Analysis, read_image: ReadImage, log: Callable[[str], None]
) -> None:
    path = folder / SUSPECTS_PICTURE
    if not analysis.suspects:
        path.unlink(missing_ok=True)
        return
    draw_suspects(path, analysis.suspects, read_image)
    log(
        f"{path}: labels to look at; {folder / SUSPECTS_FILE} has {len(analysis.suspects)} of them "
        "for a labelling tool"
    )


def dominant_error(analysis: Analysis) -> str:
    """Return the sentence on the error that costs most, with those that follow it."""
    ranked = sorted(ERROR_TYPES, key=lambda name: -analysis.errors[name].cost)
    first = ranked[0]
    if analysis.errors[first].cost <= 0:
        return f"what went wrong: nothing that costs AP50, which is {100 * analysis.ap50:.1f}"
    others = []
    for name in ranked[1:]:
        points = f"{100 * analysis.errors[name].cost:.1f}"
        if float(points) > 0:
            others.append(f"{name} {points}")
    sentence = (
        f"what went wrong: {first} ({ERROR_TYPES[first]}) costs "
        f"{100 * analysis.errors[first].cost:.1f} AP50, the most"
    )
    if others:
        sentence += f"; {', '.join(others)}"
    return sentence


def analysis_entries(analysis: Analysis) -> dict:
    """Return what `analysis.json` holds."""
    names = [*analysis.class_names, BACKGROUND_NAME]
    errors = {}
    for name, error in analysis.errors.items():
        errors[name] = {"count": error.count, "dAP": error.cost}
    worst_images = []
    for image in analysis.worst_images:
        worst_images.append(
            {
                "file": image.file_name,
                "image_id": image.image_id,
                "missed": image.missed,
                "false": image.false,
            }
        )
    suspects = []
    for suspect in analysis.suspects:
        suspects.append(
            {
                "kind": suspect.kind,
                "file": suspect.file_name,
                "image_id": suspect.image_id,
                "box": [round(corner, 2) for corner in suspect.box_xyxy],
                "label": suspect.label,
                "detected": suspect.suggested,
                "score": round(suspect.score, 4),
            }
        )
    return {
        "AP50": analysis.ap50,
        "min_score": analysis.score,
        "iou": analysis.iou,
        "errors": errors,
        "false_positives": {
            "count": analysis.false_positives.count,
            "dAP": analysis.false_positives.cost,
        },
        "false_negatives": {
            "count": analysis.false_negatives.count,
            "dAP": analysis.false_negatives.cost,
        },
        "worst_images": worst_images,
        "suspects": suspects,
        "confusion": {
            "names": names,
            "min_score": analysis.score,
            "iou": analysis.iou,
            "counts": analysis.confusion.tolist(),
        },
    }


def suspects_in_coco_format(suspects: Sequence[Suspect], ground_truth: CocoIndex) -> dict:
    """Return the suspect labels as COCO's format has annotations, for labelling tools.

    The category is the suggested one, of a box that is not found its own. Each annotation also has
    `score` and, as `attributes`, the kind and the label that the box has now.
    """
    category_of = dict(zip(ground_truth.class_names, ground_truth.category_ids, strict=True))
    suspect_ids = {suspect.image_id for suspect in suspects}
    images = []
    for i in np.flatnonzero(np.isin(ground_truth.image_ids, list(suspect_ids))):
        height, width = ground_truth.sizes[i].tolist()
        images.append(
            {
                "id": int(ground_truth.image_ids[i]),
                "file_name": name_from_bytes(ground_truth.file_names[i]),
                "height": height,
                "width": width,
            }
        )
    annotations = []
    for number, suspect in enumerate(suspects, start=1):
        left, top, right, bottom = suspect.box_xyxy
        name = suspect.label if suspect.kind == NOT_FOUND else suspect.suggested
        annotations.append(
            {
                "id": number,
                "image_id": suspect.image_id,
                "category_id": category_of[name],
                "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
                "area": round((right - left) * (bottom - top), 2),
                "iscrowd": 0,
                "segmentation": [],
                "score": round(suspect.score, 4),
                "kind": suspect.kind,
                "attributes": {
                    "kind": suspect.kind,
                    "label": suspect.label,
                    "score": round(suspect.score, 4),
                },
            }
        )
    categories = [{"id": ident, "name": name} for name, ident in category_of.items()]
    return {"images": images, "categories": categories, "annotations": annotations}
