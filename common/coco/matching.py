"""Which detections match which ground truth boxes, by the rules of COCO's evaluation.

All classes and images are treated together in flat arrays, so that a set of 5,000 images takes
seconds. The rules are those of pycocotools' `evaluateImg` for all sizes of boxes. Of each class in
each image the 100 best detections count. Each takes the free box of its class with the highest IoU,
best detection first. One that takes none is ignored where it lies in a crowd region of its class or
has a negative area.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.coco.index import CocoIndex

MAX_DETECTIONS = 100  # of a class in an image
RECALLS = np.linspace(0, 1, 101)  # at which COCO's AP takes the precision
NO_MATCH = -1
PAIRS_AT_ONCE = 1_000_000  # of a detection and a box: what bounds the memory


class GroundTruth(NamedTuple):
    """G annotated boxes, ordered by image id, those of an image in file order."""

    image: np.ndarray  # (G,) int64 position among the sorted image ids
    label: np.ndarray  # (G,) int64 position among the sorted category ids
    xyxy: np.ndarray  # (G, 4) float64 pixels
    size: np.ndarray  # (G, 2) float64 width and height in pixels
    crowd: np.ndarray  # (G,) bool
    first: np.ndarray  # (I + 1,) int64: the boxes of image i are first[i]:first[i + 1]


class Detected(NamedTuple):
    """D detections that count, ordered by image id, class and falling score."""

    image: np.ndarray  # (D,) int64 position among the sorted image ids
    label: np.ndarray  # (D,) int64 position among the sorted category ids
    xyxy: np.ndarray  # (D, 4) float64 pixels
    size: np.ndarray  # (D, 2) float64 width and height in pixels
    score: np.ndarray  # (D,) float64


class Pairs(NamedTuple):
    """P pairs of a detection and a box of its image that overlap, ordered by detection."""

    detection: np.ndarray  # (P,) int64
    box: np.ndarray  # (P,) int64
    iou: np.ndarray  # (P,) float64; with a crowd region: the share of the detection inside it


class Comparison(NamedTuple):
    """Detections beside the ground truth, and what was made of them."""

    detected: Detected
    boxes: GroundTruth
    pairs: Pairs
    matches: "Matches"


@dataclass(frozen=True, eq=False)
class Matches:
    """What has become of each detection and of each box."""

    box: np.ndarray  # (D,) int64 the box that a detection has taken, or NO_MATCH
    ignored: np.ndarray  # (D,) bool: it counts neither as right nor as wrong
    detection: np.ndarray  # (G,) int64 the detection that has taken a box, or NO_MATCH


def compare(
    ground_truth: CocoIndex, result_rows: np.ndarray, min_iou: float, min_overlap: float
) -> Comparison:
    """Match result rows (n, 7) with an index of all annotations at `min_iou`.

    The pairs are those with an IoU from `min_overlap` on, which is at most `min_iou`.
    """
    boxes = ground_truth_boxes(ground_truth)
    detected = detections_that_count(ground_truth, result_rows)
    pairs = overlapping_pairs(detected, boxes, min_overlap)
    return Comparison(detected, boxes, pairs, match(detected, boxes, pairs, min_iou))


def class_order(ground_truth: CocoIndex) -> np.ndarray:
    """Return the labels (C,) of an index by category id: the order of COCO's arrays."""
    return np.argsort(ground_truth.category_ids)


def ground_truth_boxes(ground_truth: CocoIndex) -> GroundTruth:
    """Return the boxes of an index of all annotations."""
    new_label = np.argsort(class_order(ground_truth))
    new_image = np.argsort(np.argsort(ground_truth.image_ids))
    counts = np.diff(ground_truth.offsets)
    image = np.repeat(new_image, counts)
    order = np.argsort(image, kind="stable")
    table = ground_truth.table[order]
    size = table.box_xywh[:, 2:]
    return GroundTruth(
        image=image[order],
        label=new_label[table.label],
        xyxy=np.concatenate([table.box_xywh[:, :2], table.box_xywh[:, :2] + size], axis=1),
        size=size,
        crowd=table.crowd,
        first=np.searchsorted(image[order], np.arange(len(ground_truth) + 1)),
    )


def detections_that_count(ground_truth: CocoIndex, result_rows: np.ndarray) -> Detected:
    """Return the best detections of each class in each image, from result rows (n, 7)."""
    image = np.searchsorted(np.sort(ground_truth.image_ids), result_rows[:, 0])
    label = np.searchsorted(np.sort(ground_truth.category_ids), result_rows[:, 6])
    order = np.lexsort([-result_rows[:, 5], label, image])
    image = image[order]
    label = label[order]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (np.diff(image) != 0) | (np.diff(label) != 0)
    group_starts = np.flatnonzero(is_new)
    rank = np.arange(len(order)) - group_starts[np.cumsum(is_new) - 1]
    kept = rank < MAX_DETECTIONS
    rows = result_rows[order[kept]]
    size = rows[:, 3:5]
    return Detected(
        image=image[kept],
        label=label[kept],
        xyxy=np.concatenate([rows[:, 1:3], rows[:, 1:3] + size], axis=1),
        size=size,
        score=rows[:, 5],
    )


@np.errstate(invalid="ignore", divide="ignore")  # of boxes without an area: no pair
def overlapping_pairs(detected: Detected, boxes: GroundTruth, min_iou: float) -> Pairs:
    """Return the pairs within an image, of any classes, with at least this IoU."""
    num_pairs = np.diff(boxes.first)[detected.image]  # of each detection
    ends = np.cumsum(num_pairs)
    chunks = []
    start = 0
    while start < len(num_pairs):
        pairs_before = ends[start] - num_pairs[start]
        stop = np.searchsorted(ends, pairs_before + PAIRS_AT_ONCE, side="right")
        stop = max(start + 1, int(stop))
        chunks.append(_pairs_of(np.arange(start, stop), num_pairs, detected, boxes, min_iou))
        start = stop
    if not chunks:
        nothing = np.zeros(0, np.int64)
        return Pairs(nothing, nothing, np.zeros(0))
    return Pairs(*map(np.concatenate, zip(*chunks, strict=True)))


def _pairs_of(
    detections: np.ndarray,
    num_pairs: np.ndarray,
    detected: Detected,
    boxes: GroundTruth,
    min_iou: float,
) -> Pairs:
    counts = num_pairs[detections]
    detection = np.repeat(detections, counts)
    number_in_image = np.arange(len(detection)) - np.repeat(np.cumsum(counts) - counts, counts)
    box = boxes.first[detected.image[detection]] + number_in_image
    corners = detected.xyxy[detection]
    box_corners = boxes.xyxy[box]
    right_bottom = np.minimum(corners[:, 2:], box_corners[:, 2:])
    left_top = np.maximum(corners[:, :2], box_corners[:, :2])
    sides = right_bottom - left_top
    intersection = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0)
    area = detected.size.prod(axis=1)[detection]
    box_area = boxes.size.prod(axis=1)[box]
    union = np.where(boxes.crowd[box], area, area + box_area - intersection)
    iou = intersection / union
    kept = iou >= min_iou
    return Pairs(detection[kept], box[kept], iou[kept])


def match(detected: Detected, boxes: GroundTruth, pairs: Pairs, min_iou: float) -> Matches:
    """Match detections with boxes of their class. `pairs` must have all with this IoU."""
    same_class = detected.label[pairs.detection] == boxes.label[pairs.box]
    close = same_class & (pairs.iou >= min_iou)
    in_crowd = boxes.crowd[pairs.box]
    candidates = select(pairs, close & ~in_crowd)
    # The best detection chooses first, the nearest box; of equal ones the last, as pycocotools.
    order = np.lexsort([-candidates.box, -candidates.iou, candidates.detection])
    box_of = _take_in_order(select(candidates, order), len(detected.score), len(boxes.label))
    ignored = detected.size.prod(axis=1) < 0
    ignored[pairs.detection[close & in_crowd]] = True
    ignored &= box_of == NO_MATCH
    detection_of = np.full(len(boxes.label), NO_MATCH)
    matched = np.flatnonzero(box_of != NO_MATCH)
    detection_of[box_of[matched]] = matched
    return Matches(box_of, ignored, detection_of)


def select(pairs: Pairs, kept: np.ndarray) -> Pairs:
    """Return the pairs of a mask, or of positions in their order."""
    return Pairs(pairs.detection[kept], pairs.box[kept], pairs.iou[kept])


def _take_in_order(pairs: Pairs, num_detections: int, num_boxes: int) -> np.ndarray:
    """Give each box to the first of its pairs whose detection has none; return (D,) boxes."""
    box_of = [NO_MATCH] * num_detections
    is_free = [True] * num_boxes
    for detection, box in zip(pairs.detection.tolist(), pairs.box.tolist(), strict=True):
        if is_free[box] and box_of[detection] == NO_MATCH:
            is_free[box] = False
            box_of[detection] = box
    return np.array(box_of, dtype=np.int64)


def average_precisions(
    label: np.ndarray, score: np.ndarray, is_right: np.ndarray, num_boxes: np.ndarray
) -> np.ndarray:
    """Return the AP (C,) of each class at one IoU, -1 for a class without boxes.

    label, score and is_right (n,) are those of the detections, num_boxes (C,) the boxes of each
    class. Of equal scores the order counts. As pycocotools: precision made monotone, taken at 101
    recalls.
    """
    order = np.lexsort([-score, label])
    is_right = is_right[order]
    first = np.searchsorted(label[order], np.arange(len(num_boxes) + 1))
    average = np.full(len(num_boxes), -1.0)
    for k in np.flatnonzero(num_boxes > 0):
        num_right = np.cumsum(is_right[first[k] : first[k + 1]])
        precision = num_right / np.arange(1, 1 + len(num_right))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        positions = np.searchsorted(num_right / num_boxes[k], RECALLS, side="left")
        at_recalls = np.append(precision, 0.0)[positions]
        average[k] = at_recalls.mean()
    return average


def boxes_found(comparison: Comparison, counts: np.ndarray) -> np.ndarray:
    """Return which boxes (G,) have a right detection, of the detections (D,) that count."""
    has_detection = comparison.matches.detection != NO_MATCH
    found = np.zeros(len(has_detection), dtype=bool)
    found[has_detection] = counts[comparison.matches.detection[has_detection]]
    return found


def confusion_matrix(
    comparison: Comparison, score: float, min_iou: float, num_classes: int
) -> np.ndarray:
    """Return how often each class was detected as each, (C + 1, C + 1) int64 [true, detected].

    The last is background. Detections count from `score` on. Boxes and detections of one class are
    matched first, as COCO's evaluation does; of the rest the best detection takes the nearest box
    of any class.
    """
    detected, boxes, _, matches = comparison
    background = num_classes
    counts = detected.score >= score
    detected_as = np.full(len(boxes.label), background)  # of each box
    found = boxes_found(comparison, counts)
    detected_as[found] = boxes.label[found]
    remaining = (matches.box == NO_MATCH) & ~matches.ignored & counts
    candidates = swapped_pairs(comparison, counts, min_iou)
    for detection, box in zip(candidates.detection.tolist(), candidates.box.tolist(), strict=True):
        if remaining[detection] and detected_as[box] == background:
            remaining[detection] = False
            detected_as[box] = detected.label[detection]
    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    np.add.at(confusion, (boxes.label[~boxes.crowd], detected_as[~boxes.crowd]), 1)
    np.add.at(confusion, (background, detected.label[remaining]), 1)
    return confusion


def swapped_pairs(comparison: Comparison, counts: np.ndarray, min_iou: float) -> Pairs:
    """Return the pairs of a wrong detection and a box of another class that is not found.

    They are ordered by falling score of the detections (D,) that count, then by falling IoU.
    """
    detected, boxes, pairs, matches = comparison
    is_wrong = (matches.box == NO_MATCH) & ~matches.ignored & counts
    is_open = ~boxes.crowd & ~boxes_found(comparison, counts)
    is_swapped = detected.label[pairs.detection] != boxes.label[pairs.box]
    is_near = pairs.iou >= min_iou
    near = select(pairs, is_near & is_swapped & is_wrong[pairs.detection] & is_open[pairs.box])
    return select(near, np.lexsort([-near.iou, -detected.score[near.detection]]))
