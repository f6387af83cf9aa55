"""The analysis of errors, on cases made by hand: exact counts and exact costs."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.coco.analysis import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    DUPLICATE,
    ERROR_TYPES,
    LOCALISATION,
    MISSED,
    NO_LABEL,
    NOT_FOUND,
    OTHER_CLASS,
    analyse,
)
from common.coco.evaluation import best_point, evaluate, to_result_rows
from common.coco.index import read_annotations

VAL = Path(__file__).parents[1] / "data/tiny_coco/annotations/instances_val2017.json"
PERSON, DOG, CAT = 0, 1, 2
IDS = (4, 9, 2)  # of the classes: by category id the cat is first
# Their positions by category id, which is the order of an analysis.
CAT_AT, PERSON_AT, DOG_AT = 0, 1, 2
LEFT = (10, 10, 110, 110)
RIGHT = (300, 10, 400, 110)
FAR = (10, 300, 60, 350)


def annotated(tmp_path, *boxes, crowd=(), classes=("person", "dog", "cat"), images=1):
    """An index of boxes (label, xyxy) in image 7, and of crowd regions."""
    annotations = []
    for label, (x1, y1, x2, y2) in (*boxes, *crowd):
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": 7,
                "category_id": IDS[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": int(len(annotations) >= len(boxes)),
            }
        )
    content = {
        "images": [
            {"id": 7 + i, "file_name": f"image{7 + i}.jpg", "height": 480, "width": 640}
            for i in range(images)
        ],
        "categories": [{"id": IDS[label], "name": name} for label, name in enumerate(classes)],
        "annotations": annotations,
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return read_annotations(str(path), classes=classes)


def rows(*detections, image_id=7):
    """Result rows of detections (label, xyxy, score)."""
    of_each = [
        to_result_rows(image_id, [box], [score], [label], IDS) for label, box, score in detections
    ]
    return np.concatenate([np.empty((0, 7)), *of_each])


def shifted(box, x):
    return (box[0] + x, box[1], box[2] + x, box[3])


def counts(analysis):
    return {name: error.count for name, error in analysis.errors.items() if error.count}


def costs(analysis):
    """The costs above zero; those of one error are exact."""
    return {name: error.cost for name, error in analysis.errors.items() if error.cost}


def test_a_swapped_class(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT))
    result_rows = rows((DOG, LEFT, 0.9))
    analysis = analyse(index, result_rows, 0.5)
    assert counts(analysis) == {CLASSIFICATION: 1}
    assert costs(analysis) == {CLASSIFICATION: 1.0}
    assert analysis.ap50 == 0
    assert analysis.confusion[PERSON_AT, DOG_AT] == 1
    assert analysis.confusion.sum() == 1
    assert analysis.false_positives == (1, 0.0)
    assert analysis.false_negatives == (1, 1.0)
    (suspect,) = analysis.suspects
    assert suspect == (OTHER_CLASS, 7, "image7.jpg", LEFT, "person", "dog", 0.9)
    assert analysis.worst_images == [(7, "image7.jpg", 1, 1)]


def test_a_shifted_box(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT))
    analysis = analyse(index, rows((PERSON, shifted(LEFT, 50), 0.9)), 0.5)  # IoU 1/3
    assert counts(analysis) == {LOCALISATION: 1}
    assert costs(analysis) == {LOCALISATION: 1.0}
    assert analysis.confusion[PERSON_AT, -1] == 1
    assert analysis.confusion[-1, PERSON_AT] == 1
    assert analysis.suspects == []


def test_of_several_errors_at_a_box_the_best_is_put_right(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT))
    detections = rows((PERSON, shifted(LEFT, 50), 0.9), (PERSON, shifted(LEFT, 60), 0.95))
    analysis = analyse(index, detections, 0.5)
    assert counts(analysis) == {LOCALISATION: 2}
    assert costs(analysis) == {LOCALISATION: 1.0}


def test_one_duplicate(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT), (PERSON, RIGHT))
    detections = rows((PERSON, LEFT, 0.9), (PERSON, shifted(LEFT, 10), 0.8), (PERSON, RIGHT, 0.7))
    analysis = analyse(index, detections, 0.5)
    ap50 = (51 + 50 * 2 / 3) / 101  # precision 1 up to recall 0.5, then 2/3
    assert analysis.ap50 == pytest.approx(ap50)
    assert counts(analysis) == {DUPLICATE: 1}
    assert costs(analysis) == {DUPLICATE: pytest.approx(1 - ap50)}
    assert analysis.confusion[PERSON_AT, PERSON_AT] == 2
    assert analysis.confusion[-1, PERSON_AT] == 1


def test_one_missed(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT), (PERSON, RIGHT))
    analysis = analyse(index, rows((PERSON, LEFT, 0.9)), 0.5)
    assert counts(analysis) == {MISSED: 1}
    assert costs(analysis) == {MISSED: pytest.approx(50 / 101)}
    assert analysis.false_negatives == (1, pytest.approx(50 / 101))
    assert analysis.false_positives == (0, 0)
    (suspect,) = analysis.suspects
    assert suspect == (NOT_FOUND, 7, "image7.jpg", RIGHT, "person", "", 0.5)
    assert analysis.worst_images == [(7, "image7.jpg", 1, 0)]


def test_one_false_on_background(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT))
    detections = rows((PERSON, FAR, 0.95), (PERSON, LEFT, 0.9), (PERSON, shifted(FAR, 5), 0.85))
    analysis = analyse(index, detections, 0.5)
    assert counts(analysis) == {BACKGROUND: 2}
    assert costs(analysis) == {BACKGROUND: 0.5}
    assert analysis.false_positives == (2, 0.5)
    assert analysis.confusion[-1, PERSON_AT] == 2
    # Of two detections at one place the better one is shown.
    (suspect,) = analysis.suspects
    assert suspect == (NO_LABEL, 7, "image7.jpg", FAR, "", "person", 0.95)


def test_wrong_class_and_place(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT), (DOG, RIGHT))
    detections = rows((DOG, shifted(LEFT, 50), 0.9), (PERSON, LEFT, 0.8), (DOG, RIGHT, 0.7))
    analysis = analyse(index, detections, 0.5)
    assert counts(analysis) == {BOTH: 1}
    assert costs(analysis) == {BOTH: 0.25}  # the dog's AP is 1/2


def test_crowd_regions_are_no_errors(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT), crowd=[(PERSON, (250, 0, 640, 200))])
    detections = rows((PERSON, RIGHT, 0.95), (PERSON, LEFT, 0.9))
    analysis = analyse(index, detections, 0.5)
    assert counts(analysis) == {}
    assert costs(analysis) == {}
    assert analysis.ap50 == 1
    assert analysis.confusion.sum() == 1
    assert analysis.suspects == analysis.worst_images == []
    evaluation = evaluate(index.annotation_file, detections)
    assert evaluation.best == (0.9, 1, 1, 1)
    assert np.array_equal(evaluation.confusion, analysis.confusion)


def test_scores_below_the_given_one_count_for_ap_only(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT), images=2)
    detections = np.concatenate([rows((PERSON, LEFT, 0.3)), rows((DOG, FAR, 0.2), image_id=8)])
    analysis = analyse(index, detections, 0.5)
    assert analysis.ap50 == 1
    assert analysis.confusion[PERSON_AT, -1] == analysis.confusion.sum() == 1
    assert counts(analysis) == {BACKGROUND: 1}
    assert analysis.worst_images == [(7, "image7.jpg", 1, 0)]
    assert analysis.suspects == []


def test_no_detections_at_all(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT), (DOG, RIGHT))
    analysis = analyse(index, rows(), 0.5)
    assert counts(analysis) == {MISSED: 2}
    assert costs(analysis) == {MISSED: 1.0}
    assert analysis.confusion[:-1, -1].sum() == 2
    assert len(analysis.suspects) == 2


def test_no_ground_truth_at_all(tmp_path):
    index = annotated(tmp_path)
    analysis = analyse(index, rows((PERSON, LEFT, 0.9)), 0.5)
    assert counts(analysis) == {BACKGROUND: 1}
    assert costs(analysis) == {}
    assert analysis.ap50 == 0
    evaluation = evaluate(index.annotation_file, rows((PERSON, LEFT, 0.9)))
    points = [evaluation.best, *(metrics.best for metrics in evaluation.classes)]
    assert set(points) == {(-1, -1, -1, -1)}


def test_one_class(tmp_path):
    index = annotated(tmp_path, (PERSON, LEFT), classes=("person",))
    analysis = analyse(index, rows((PERSON, LEFT, 0.9), (PERSON, FAR, 0.8)), 0.5)
    assert analysis.confusion.tolist() == [[1, 0], [1, 0]]
    assert counts(analysis) == {BACKGROUND: 1}
    assert costs(analysis) == {}


def jittered(index, seed):
    """Result rows: moved, missing and doubled boxes, wrong classes and false alarms."""
    rng = np.random.default_rng(seed)
    present = np.unique(index.table.label)
    result_rows = []
    for i in range(len(index)):
        gt = index.annotations(i)
        num = 3 * len(gt)
        boxes = gt.box_xywh.repeat(3, axis=0)
        sizes = boxes[:, 2:] * np.exp(rng.normal(0, 0.2, (num, 2)))
        corners = boxes[:, :2] + rng.normal(0, 0.1, (num, 2)) * sizes
        is_elsewhere = rng.random(num) < 0.2
        corners[is_elsewhere] = rng.random((is_elsewhere.sum(), 2)) * index.sizes[i][::-1]
        boxes = np.concatenate([corners, corners + sizes], axis=1)
        is_swapped = rng.random(num) < 0.2
        labels = np.where(is_swapped, rng.choice(present, num), gt.label.repeat(3))
        kept = rng.random(num) < 0.6
        result_rows.append(
            to_result_rows(
                index.image_ids[i],
                boxes[kept],
                rng.random(kept.sum()),
                labels[kept],
                index.category_ids,
            )
        )
    return np.concatenate(result_rows)


def test_a_perfect_detector_has_all_zero():
    index = read_annotations(str(VAL))
    result_rows = []
    for i in range(len(index)):
        gt = index.annotations(i)[~index.annotations(i).crowd]
        boxes = np.concatenate([gt.box_xywh[:, :2], gt.box_xywh[:, :2] + gt.box_xywh[:, 2:]], 1)
        scores = np.full(len(gt), 0.9)
        ids = index.category_ids
        result_rows.append(to_result_rows(index.image_ids[i], boxes, scores, gt.label, ids))
    analysis = analyse(index, np.concatenate(result_rows), 0.9)
    assert counts(analysis) == costs(analysis) == {}
    assert analysis.false_positives == analysis.false_negatives == (0, 0)
    assert analysis.worst_images == analysis.suspects == []
    assert analysis.confusion.trace() == analysis.confusion.sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_real_boxes_agree_with_the_evaluation(seed):
    index = read_annotations(str(VAL))
    result_rows = jittered(index, seed)
    evaluation = evaluate(str(VAL), result_rows)
    analysis = analyse(index, result_rows, evaluation.best.score)
    assert analysis.ap50 == pytest.approx(evaluation.stats["AP50"], abs=1e-12)
    assert np.array_equal(analysis.confusion, evaluation.confusion)
    assert analysis.class_names == [metrics.name for metrics in evaluation.classes]
    num_boxes = [metrics.num_boxes for metrics in evaluation.classes]
    assert analysis.confusion[:-1].sum(axis=1).tolist() == num_boxes
    assert all(analysis.errors[name].count > 5 for name in ERROR_TYPES)
    of_detections = sum(analysis.errors[name].count for name in ERROR_TYPES if name != MISSED)
    assert of_detections == analysis.false_positives.count
    # The point with the best F1 and the confusion at its score say the same.
    num_right = analysis.confusion.trace()
    assert num_right / sum(num_boxes) == pytest.approx(evaluation.best.recall)
    detected = analysis.confusion[:, :-1].sum()
    assert num_right / detected == pytest.approx(evaluation.best.precision)
    scores = [suspect.score for suspect in analysis.suspects]
    assert scores == sorted(scores, reverse=True)
    assert len({suspect.kind for suspect in analysis.suspects}) == 3


def test_the_best_point_keeps_equal_scores_together():
    scores = np.array([0.2, 0.9, 0.5, 0.5])
    is_right = np.array([True, True, False, True])
    point = best_point(scores, is_right, 4)
    assert point == (0.2, 3 / 4, 3 / 4, 3 / 4)
    is_right[0] = False
    assert best_point(scores, is_right, 2) == (0.5, 2 / 3, 1, 4 / 5)
    assert best_point(scores, np.zeros(4, dtype=bool), 3) == (-1, 0, 0, 0)
    assert best_point(scores, is_right, 0) == (-1, -1, -1, -1)
