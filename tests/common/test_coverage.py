"""Which boxes have an anchor, the table of them, and the advice."""

import numpy as np
import pytest
import torch

from common.coco import coverage
from common.coco.counts import TrainingBoxes
from common.coco.coverage import Coverage, Matching, Presets, advise, report_coverage
from ssd_resnet34.targets import pairwise_iou


def boxes_around(centers, sizes):
    centers = np.array(centers, np.float64)
    half = np.array(sizes, np.float64) / 2
    return np.concatenate([centers - half, centers + half], axis=1)


# Two feature maps whose anchors have one size: together they form no grid.
ANCHORS = torch.tensor(
    np.concatenate(
        [
            boxes_around([[x, y] for y in (10, 30, 50) for x in (10, 30)], [[20, 20]] * 6),
            boxes_around([[22, 22]], [[20, 20]]),
            boxes_around([[20, 30]], [[40, 20]]),
        ]
    ),
    dtype=torch.float32,
)


def fitted(boxes):
    return coverage.fitted_boxes(boxes, ANCHORS, pairwise_iou, 0.5)


def test_a_box_equal_to_an_anchor_is_fitted():
    assert fitted(ANCHORS.numpy()).all()


def test_a_box_of_another_size_or_place_is_not():
    boxes = boxes_around(
        [[10, 10], [10, 10], [200, 10], [20, 10]], [[3, 3], [60, 60], [20, 20], [20, 20]]
    )
    assert not fitted(boxes).any()


def test_equal_to_the_overlaps_with_all_anchors():
    random = np.random.default_rng(0)
    boxes = boxes_around(random.uniform(0, 60, (2000, 2)), random.uniform(5, 45, (2000, 2)))
    overlaps = pairwise_iou(torch.tensor(boxes, dtype=torch.float32).unsqueeze(0), ANCHORS)
    expected = (overlaps.squeeze(0).amax(dim=1) > 0.5).tolist()
    assert 50 < sum(expected) < 1950
    assert fitted(boxes).tolist() == expected


# A detector that sees a box from 16 pixels on, in an input of `recipe` x `recipe` pixels.
FROM_16 = Matching(
    kind="anchors",
    fields=("real",),
    input_size=lambda recipe: f"{recipe} x {recipe}",
    boxes_in_input=lambda boxes, sizes, recipe: boxes * np.tile(recipe / sizes[:, ::-1], 2),
    seen_boxes=lambda boxes, recipe: boxes[:, 2] - boxes[:, 0] >= 16,
    seen="it has 16 pixels",
    unseen="lost",
)


def squares(sides, labels=None):
    """Boxes at the corner of images of 1000 x 1000 pixels; one class has 100 of them at least."""
    boxes = np.array([[0, 0, side, side] for side in sides], np.float64)
    return TrainingBoxes(
        image_sizes=np.full((1, 2), 1000),
        image_of_box=np.zeros(len(boxes), np.int64),
        boxes_xyxy=boxes,
        labels=np.zeros(len(boxes), np.int64) if labels is None else np.array(labels),
        class_names=("dog", "cat")[: 1 if labels is None else 2],
        num_crowds=0,
    )


def report(sides, *inputs, labels=None):
    """The lines about boxes of these sides for presets with these inputs; the first is chosen."""
    recipes = {f"p{size}": size for size in inputs}
    presets = Presets(f"p{inputs[0]}", inputs[0], recipes, FROM_16)
    return report_coverage(squares(sides, labels), presets)


def test_the_table_has_a_line_for_each_preset_that_sees_other_boxes():
    found = report([5, 20, 40, 200] * 25, 500, 1000, 500)
    assert found.lines[:6] == [
        "what --recipe p500 sees of the boxes, by their side: the root of the area in pixels of "
        "the network input (500 x 500)",
        "side, pixels                            0-8  8-16  16-32  32-64  64-96   >96  all",
        "boxes                                    25    25     25      0      0    25  100",
        "seen                                     0%    0%   100%      -      -  100%  50%",
        "seen with --recipe p1000 (1000 x 1000)   0%  100%   100%      -      -  100%  75%",
        "seen: it has 16 pixels; the others: lost",
    ]
    assert found.chosen.share == 0.5


@pytest.mark.parametrize(
    ("sides", "inputs", "advice"),
    [
        ([100] * 20, (500, 1000), "fine as it is: 100% of the boxes are seen."),
        (
            [20, 30] * 10,
            (500, 1000, 250),
            "take --recipe p1000, whose input of 1000 x 1000 sees 100% of the boxes instead of 0%.",
        ),
        (
            [20, 9] * 10,
            (500, 1000),
            "take --recipe p1000, whose input of 1000 x 1000 sees 50% of the boxes instead of 0%, "
            "and cut the images into 2 x 2 overlapping tiles (no program here does), in which it "
            "sees 100%.",
        ),
        (
            [6, 9] * 10,
            (500, 600),
            "no other preset sees much more than the 0% of the boxes that this one sees: cut the "
            "images into 4 x 4 overlapping tiles (no program here does), in which it sees 50%.",
        ),
        (
            [1] * 20,
            (500, 600),
            "only 0% of the boxes are seen, and neither another preset nor tiles help: the boxes "
            "are too small or of shapes that no anchor has, so look at the other models with "
            "compare.py --data.",
        ),
    ],
)
def test_the_advice_fits_the_boxes(sides, inputs, advice):
    assert report(sides, *inputs).lines[-1] == f"advice: {advice}"


def test_the_advice_names_how_many_classes_have_few_boxes():
    found = report([100] * 23, 500, labels=[0] * 20 + [1] * 3)
    assert found.lines[-1] == (
        "advice: fine as it is: 100% of the boxes are seen; and label more: 1 of 2 classes have "
        "fewer than 10 boxes."
    )


def test_a_box_larger_than_a_tile_is_not_seen_in_it():
    whole = Coverage("a", "1", np.zeros(4), np.array([True, False, False, False]))
    boxes = squares([600, 600, 20, 20])
    share = coverage.cover_in_tiles(boxes.boxes_xyxy, boxes.sizes_of_boxes, 2, 500, FROM_16)
    assert share == 0.5
    assert "tiles" in advise(whole, whole, {2: share}, num_rare=0, num_classes=1)


def test_of_many_boxes_a_sample_is_taken(monkeypatch):
    monkeypatch.setattr(coverage, "SAMPLE_SIZE", 50)
    found = report([100, 10] * 100, 500)
    assert found.lines[0].endswith("; 50 boxes, drawn with seed 0")
    assert len(found.chosen.seen) == 50
    assert report([100, 10] * 100, 500).lines == found.lines
