"""What went wrong in a set of detections: types of errors, confusion, worst images, suspect labels.

The types of errors and what each costs are those of TIDE: Bolya, Foley, Hays, Hoffman: "TIDE: A
General Toolbox for Identifying Object Detection Errors", ECCV 2020, sections 2 and 3.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.coco.index import CocoIndex, name_from_bytes
from common.coco.matching import (
    NO_MATCH,
    Comparison,
    Detected,
    GroundTruth,
    Pairs,
    average_precisions,
    boxes_found,
    class_order,
    compare,
    confusion_matrix,
    select,
    swapped_pairs,
)

FOREGROUND_IOU = 0.5  # from which a detection can be right
BACKGROUND_IOU = 0.1  # below which a detection lies on background

CLASSIFICATION = "classification"
LOCALISATION = "localisation"
BOTH = "both"
DUPLICATE = "duplicate"
BACKGROUND = "background"
MISSED = "missed"
# In the order in which TIDE lists them, with what a sentence says about each.
ERROR_TYPES = {
    CLASSIFICATION: "right box, wrong class",
    LOCALISATION: "right class, inexact box",
    BOTH: "wrong class, inexact box",
    DUPLICATE: "box of an object that a better detection has",
    BACKGROUND: "detection where no object is labelled",
    MISSED: "object that no detection is near",
}
# How the analysis numbers the detections.
NO_ERROR = -1
ERROR_NAMES = tuple(ERROR_TYPES)

NO_LABEL = "no label"
NOT_FOUND = "not found"
OTHER_CLASS = "other class"
# What a suspect label is, for documents and pictures.
SUSPECT_KINDS = {
    NO_LABEL: "a confident detection where no box is",
    NOT_FOUND: "a box that no detection overlaps",
    OTHER_CLASS: "a confident detection of another class on a box",
}
# A detection below this score does not find a box.
FINDING_SCORE = 0.05
SUSPECTS_OF_A_KIND = 100  # that are kept
WORST_IMAGES = 50  # that are kept
# Borders of COCO's sizes of objects, in pixels of area.
SIZE_BORDERS = (32**2, 96**2)


class ErrorCost(NamedTuple):
    """How often an error occurs, and how much AP50 would rise without it (dAP, 0 to 1)."""

    count: int
    cost: float


class WorstImage(NamedTuple):
    """An image with its numbers of missed boxes and false detections."""

    image_id: int
    file_name: str
    missed: int
    false: int


class Suspect(NamedTuple):
    """A label that may be wrong or lacking.

    The score is that of the detection; of a box that is not found the share of the boxes of its
    class and size that are found.
    """

    kind: str  # of SUSPECT_KINDS
    image_id: int
    file_name: str
    box_xyxy: tuple[float, float, float, float]  # pixels
    label: str  # the class of the box, "" where there is none
    suggested: str  # the class of the detection, "" where there is none
    score: float


@dataclass(frozen=True, eq=False)
class Analysis:
    """The result of `analyse`."""

    class_names: list[str]  # by category id
    score: float  # from which a detection counts in `confusion`, `worst_images` and `suspects`
    iou: float  # from which a detection is at a box
    ap50: float  # the mean of all classes, 0 where there is no ground truth
    # (C + 1, C + 1) int64 [true, detected]; the last is background: a missed box or a false
    # detection
    confusion: np.ndarray
    errors: dict[str, ErrorCost]  # keys of ERROR_TYPES; of detections of any score
    false_positives: ErrorCost  # all detections that are not right
    false_negatives: ErrorCost  # all boxes without a right detection
    worst_images: list[WorstImage]  # most errors first
    suspects: list[Suspect]  # highest score first


class _Errors(NamedTuple):
    """The error of each detection and each box, and the box at which a detection erred."""

    type: np.ndarray  # (D,) int64 position in ERROR_NAMES, or NO_ERROR
    box: np.ndarray  # (D,) int64 the box that it meant, of errors of class and of place
    missed: np.ndarray  # (G,) bool


def analyse(ground_truth: CocoIndex, result_rows: np.ndarray, score: float) -> Analysis:
    """Find out what is wrong in detections, result rows (n, 7).

    `ground_truth` is an index of all annotations, see `read_annotations`; result rows must be of
    its images and categories. `score` is that from which detections count in what is not about AP:
    the one with the best F1 of `Evaluation`.
    """
    comparison = compare(ground_truth, result_rows, FOREGROUND_IOU, BACKGROUND_IOU)
    detected, boxes, _, matches = comparison
    names = [ground_truth.class_names[label] for label in class_order(ground_truth)]
    num_boxes = np.bincount(boxes.label[~boxes.crowd], minlength=len(names))
    is_right = matches.box != NO_MATCH
    is_wrong = ~is_right & ~matches.ignored
    ap50 = _mean_ap(detected, is_right, is_right | is_wrong, num_boxes)
    errors = _classify(comparison)
    costs = {}
    for name in ERROR_NAMES:
        costs[name] = _cost(name, errors, comparison, num_boxes, ap50)
    num_found = np.bincount(boxes.label[matches.detection != NO_MATCH], minlength=len(names))
    false_positives = ErrorCost(
        count=int(is_wrong.sum()),
        cost=_mean_ap(detected, is_right, is_right, num_boxes) - ap50,
    )
    false_negatives = ErrorCost(
        count=int(num_boxes.sum() - num_found.sum()),
        cost=_mean_ap(detected, is_right, is_right | is_wrong, num_found, num_boxes) - ap50,
    )
    counts = detected.score >= score
    is_false = is_wrong & counts
    is_missed = ~boxes.crowd & ~boxes_found(comparison, counts)
    names_of_files = _FileNames(ground_truth)
    return Analysis(
        class_names=names,
        score=score,
        iou=FOREGROUND_IOU,
        ap50=ap50,
        confusion=confusion_matrix(comparison, score, FOREGROUND_IOU, len(names)),
        errors=costs,
        false_positives=false_positives,
        false_negatives=false_negatives,
        worst_images=_worst_images(
            boxes.image[is_missed], detected.image[is_false], names_of_files
        ),
        suspects=_suspects(comparison, counts, names, names_of_files),
    )


class _FileNames:
    """Ids and file names of the images, by their position among the sorted image ids."""

    def __init__(self, ground_truth: CocoIndex):
        self._order = np.argsort(ground_truth.image_ids)
        self._index = ground_truth

    def __len__(self) -> int:
        return len(self._order)

    def image_id(self, image: int) -> int:
        return int(self._index.image_ids[self._order[image]])

    def name(self, image: int) -> str:
        return name_from_bytes(self._index.file_names[self._order[image]])


def _best_of_each(pairs: Pairs, num_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the box with the highest IoU of each detection, and the IoU, both (D,).

    A detection without a pair has NO_MATCH and 0; of boxes with the same IoU the first is taken.
    """
    order = np.lexsort([-pairs.box, pairs.iou, pairs.detection])
    box = np.full(num_detections, NO_MATCH)
    iou = np.zeros(num_detections)
    # Of several entries of a detection the last one stays.
    box[pairs.detection[order]] = pairs.box[order]
    iou[pairs.detection[order]] = pairs.iou[order]
    return box, iou


def _classify(comparison: Comparison) -> _Errors:
    """Return the type of error of each detection and which boxes are missed.

    A wrong detection has the first of the types that fits: localisation, classification, duplicate,
    background, both. A box is missed if it has no right detection and no error of class or place.
    """
    detected, boxes, pairs, matches = comparison
    num_detections = len(detected.score)
    with_box = select(pairs, ~boxes.crowd[pairs.box])
    same_class = detected.label[with_box.detection] == boxes.label[with_box.box]
    box_of_class, iou_of_class = _best_of_each(select(with_box, same_class), num_detections)
    box_of_others, iou_of_others = _best_of_each(select(with_box, ~same_class), num_detections)
    is_wrong = (matches.box == NO_MATCH) & ~matches.ignored
    is_inexact = (iou_of_class >= BACKGROUND_IOU) & (iou_of_class < FOREGROUND_IOU)
    cases = [
        (LOCALISATION, is_inexact),
        (CLASSIFICATION, iou_of_others >= FOREGROUND_IOU),
        (DUPLICATE, iou_of_class >= FOREGROUND_IOU),
        (BACKGROUND, np.maximum(iou_of_class, iou_of_others) < BACKGROUND_IOU),
        (BOTH, np.ones(num_detections, dtype=bool)),
    ]
    error = np.full(num_detections, NO_ERROR)
    open_cases = is_wrong
    for name, fits in cases:
        error[open_cases & fits] = ERROR_NAMES.index(name)
        open_cases = open_cases & ~fits
    box = np.full(num_detections, NO_MATCH)
    for name, box_meant in ((LOCALISATION, box_of_class), (CLASSIFICATION, box_of_others)):
        is_it = error == ERROR_NAMES.index(name)
        box[is_it] = box_meant[is_it]
    missed = (matches.detection == NO_MATCH) & ~boxes.crowd
    missed[box[box != NO_MATCH]] = False
    return _Errors(error, box, missed)


def _cost(
    name: str, errors: _Errors, comparison: Comparison, num_boxes: np.ndarray, ap50: float
) -> ErrorCost:
    """Return the count of an error and what AP50 gains where it is put right.

    An error of class or place becomes right where its box has no right detection: of several such
    errors at a box the one with the highest score does, the others go. All other wrong detections
    go. A box that is missed no longer counts.
    """
    detected, boxes, _, matches = comparison
    label = detected.label
    is_right = matches.box != NO_MATCH
    counts = ~matches.ignored
    left = num_boxes
    if name == MISSED:
        num_errors = int(errors.missed.sum())
        left = num_boxes - np.bincount(boxes.label[errors.missed], minlength=len(num_boxes))
    else:
        is_it = errors.type == ERROR_NAMES.index(name)
        num_errors = int(is_it.sum())
        counts = counts & ~is_it
        repairable = is_it & (errors.box != NO_MATCH)
        repairable[repairable] = matches.detection[errors.box[repairable]] == NO_MATCH
        candidates = np.flatnonzero(repairable)
        order = np.lexsort([-detected.score[candidates], errors.box[candidates]])
        candidates = candidates[order]
        is_first = np.ones(len(candidates), dtype=bool)
        is_first[1:] = np.diff(errors.box[candidates]) != 0
        repaired = candidates[is_first]
        counts[repaired] = True
        is_right[repaired] = True
        label = label.copy()
        label[repaired] = boxes.label[errors.box[repaired]]
    fixed = detected._replace(label=label)
    return ErrorCost(num_errors, _mean_ap(fixed, is_right, counts, left, num_boxes) - ap50)


def _mean_ap(
    detected: Detected,
    is_right: np.ndarray,
    counts: np.ndarray,
    num_boxes: np.ndarray,
    num_boxes_before: np.ndarray | None = None,
) -> float:
    """Return the mean AP at one IoU of the classes with boxes, of the detections that count.

    num_boxes (C,) are what the recall refers to. A class that had boxes, num_boxes_before, of which
    none is left has AP 1, or 0 with a detection: all of its detections are wrong.
    """
    label = detected.label[counts]
    average = average_precisions(label, detected.score[counts], is_right[counts], num_boxes)
    if num_boxes_before is None:
        num_boxes_before = num_boxes
    none_left = (num_boxes == 0) & (num_boxes_before > 0)
    has_detection = np.bincount(label, minlength=len(num_boxes)) > 0
    average[none_left] = np.where(has_detection[none_left], 0.0, 1.0)
    of_mean = average[num_boxes_before > 0]
    return float(of_mean.mean()) if len(of_mean) else 0.0


def _worst_images(
    images_of_missed: np.ndarray, images_of_false: np.ndarray, files: _FileNames
) -> list[WorstImage]:
    """Return the images with most errors, from the images of each error."""
    missed = np.bincount(images_of_missed, minlength=len(files))
    false = np.bincount(images_of_false, minlength=len(files))
    worst = []
    for image in np.argsort(-(missed + false), kind="stable")[:WORST_IMAGES].tolist():
        if missed[image] + false[image]:
            worst.append(
                WorstImage(
                    files.image_id(image), files.name(image), int(missed[image]), int(false[image])
                )
            )
    return worst


def _suspects(
    comparison: Comparison, counts: np.ndarray, names: list[str], files: _FileNames
) -> list[Suspect]:
    """Return labels that may be wrong, up to SUSPECTS_OF_A_KIND of each kind."""
    detected, boxes, pairs, _ = comparison
    suspects = []
    for detection in _without_label(detected, pairs, counts):
        suspects.append(
            Suspect(
                kind=NO_LABEL,
                image_id=files.image_id(detected.image[detection]),
                file_name=files.name(detected.image[detection]),
                box_xyxy=tuple(detected.xyxy[detection].tolist()),
                label="",
                suggested=names[detected.label[detection]],
                score=float(detected.score[detection]),
            )
        )
    for box, share in _not_found(detected, boxes, pairs):
        suspects.append(
            Suspect(
                kind=NOT_FOUND,
                image_id=files.image_id(boxes.image[box]),
                file_name=files.name(boxes.image[box]),
                box_xyxy=tuple(boxes.xyxy[box].tolist()),
                label=names[boxes.label[box]],
                suggested="",
                score=share,
            )
        )
    for box, detection in _of_other_class(comparison, counts):
        suspects.append(
            Suspect(
                kind=OTHER_CLASS,
                image_id=files.image_id(boxes.image[box]),
                file_name=files.name(boxes.image[box]),
                box_xyxy=tuple(boxes.xyxy[box].tolist()),
                label=names[boxes.label[box]],
                suggested=names[detected.label[detection]],
                score=float(detected.score[detection]),
            )
        )
    return sorted(suspects, key=lambda suspect: -suspect.score)


def _without_label(detected: Detected, pairs: Pairs, counts: np.ndarray) -> list[int]:
    """Return the best detections that overlap no box, of those at one place the best one."""
    overlaps = np.zeros(len(counts), dtype=bool)
    overlaps[pairs.detection] = True
    candidates = np.flatnonzero(counts & ~overlaps)
    candidates = candidates[np.argsort(-detected.score[candidates], kind="stable")]
    kept: list[int] = []
    kept_of_image: dict[int, list[int]] = {}
    for detection in candidates.tolist():
        if len(kept) == SUSPECTS_OF_A_KIND:
            break
        others = kept_of_image.setdefault(int(detected.image[detection]), [])
        if not _overlaps_any(detected.xyxy[detection], detected.xyxy[others]):
            others.append(detection)
            kept.append(detection)
    return kept


def _overlaps_any(box: np.ndarray, others: np.ndarray) -> bool:
    """Return whether a box (4,) has FOREGROUND_IOU with one of others (n, 4), xyxy pixels."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    union = areas + (box[2:] - box[:2]).prod() - intersection
    return bool((intersection >= FOREGROUND_IOU * union).any())


def _not_found(detected: Detected, boxes: GroundTruth, pairs: Pairs) -> list[tuple[int, float]]:
    """Return the boxes that no detection overlaps, with the share of such boxes that are found.

    Of the same class and size: where most are found, a box that is not is the more suspect.
    """
    is_found = np.zeros(len(boxes.label), dtype=bool)
    is_found[pairs.box[detected.score[pairs.detection] >= FINDING_SCORE]] = True
    is_object = ~boxes.crowd
    sizes = np.digitize(boxes.size.prod(axis=1), SIZE_BORDERS)
    group = boxes.label * (len(SIZE_BORDERS) + 1) + sizes
    num_of_group = np.bincount(group[is_object])
    num_found = np.bincount(group[is_object & is_found], minlength=len(num_of_group))
    has_area = np.isfinite(boxes.xyxy).all(axis=1) & (boxes.size > 0).all(axis=1)
    candidates = np.flatnonzero(is_object & ~is_found & has_area)
    shares = num_found[group[candidates]] / num_of_group[group[candidates]]
    order = np.argsort(-shares, kind="stable")[:SUSPECTS_OF_A_KIND]
    return list(zip(candidates[order].tolist(), shares[order].tolist(), strict=True))


def _of_other_class(comparison: Comparison, counts: np.ndarray) -> list[tuple[int, int]]:
    """Return boxes without a right detection, and the best detection of another class on each."""
    candidates = swapped_pairs(comparison, counts, FOREGROUND_IOU)
    detection_of: dict[int, int] = {}
    for detection, box in zip(candidates.detection.tolist(), candidates.box.tolist(), strict=True):
        detection_of.setdefault(box, detection)
    return list(detection_of.items())[:SUSPECTS_OF_A_KIND]


class ImageErrors(NamedTuple):
    """What is right and wrong in an image, of detections from a score on; boxes in xyxy pixels."""

    boxes_xyxy: np.ndarray  # (n, 4) ground truth without crowd regions
    box_names: list[str]
    is_missed: np.ndarray  # (n,) bool
    detected_xyxy: np.ndarray  # (m, 4)
    detected_names: list[str]
    scores: np.ndarray  # (m,)
    is_false: np.ndarray  # (m,) bool; what lies in a crowd region is not


def errors_of_image(
    ground_truth: CocoIndex, result_rows: np.ndarray, image_id: int, score: float
) -> ImageErrors:
    """Return what is right and wrong in one image."""
    image = ground_truth.subset(np.flatnonzero(ground_truth.image_ids == image_id))
    rows = result_rows[result_rows[:, 0] == image_id]
    comparison = compare(image, rows, FOREGROUND_IOU, FOREGROUND_IOU)
    detected, boxes, _, matches = comparison
    names = [ground_truth.class_names[label] for label in class_order(ground_truth)]
    counts = detected.score >= score
    is_object = ~boxes.crowd
    is_false = (matches.box == NO_MATCH) & ~matches.ignored
    return ImageErrors(
        boxes_xyxy=boxes.xyxy[is_object],
        box_names=[names[label] for label in boxes.label[is_object]],
        is_missed=~boxes_found(comparison, counts)[is_object],
        detected_xyxy=detected.xyxy[counts],
        detected_names=[names[label] for label in detected.label[counts]],
        scores=detected.score[counts],
        is_false=is_false[counts],
    )
