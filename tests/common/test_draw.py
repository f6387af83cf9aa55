"""Drawn boxes lie where they should, and sheets are written whole."""

import numpy as np
import pytest
from PIL import Image

from common.coco.draw import MIN_SCORE, Example, draw_boxes, draw_sheet

NAMES = ("disc", "box", "triangle", "star")
GREY = np.full((120, 200, 3), 128, np.uint8)
NO_BOXES, NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def drawn(*args, **flags):
    """Where `draw_boxes` changed the grey picture (H, W) bool, and its pixels."""
    pixels = np.asarray(draw_boxes(GREY, *args, **flags))
    return (pixels != 128).any(2), pixels


def test_outline_is_drawn_on_the_box_and_not_inside():
    before = GREY.copy()
    changed, pixels = drawn(np.array([[50, 40, 150, 100]], np.float32), [1], NAMES)
    np.testing.assert_array_equal(GREY, before)
    assert changed[40:101, 50].all()
    assert changed[100, 50:151].all()
    assert changed[40:101, 150].all()
    assert not changed[44:97, 54:147].any()
    assert not changed[102:].any()
    other = drawn(np.array([[50, 40, 150, 100]], np.float32), [2], NAMES)[1]
    assert tuple(pixels[100, 100]) != tuple(other[100, 100])  # a class has its colour


def test_boxes_are_cut_at_the_border_and_outside_ones_left_out():
    changed, _ = drawn(np.array([[-30, 60, 500, 400.0]]), [0], NAMES)
    assert changed[60:, 0].all()
    assert changed[60:, -1].all()
    assert changed[-1].all()
    assert not drawn(np.array([[210, 10, 250, 60.0]]), [0], NAMES)[0].any()


def test_an_empty_name_has_no_tag():
    boxes = np.array([[50, 40, 150, 100.0]])
    named, _ = drawn(boxes, [0], NAMES)
    nameless, _ = drawn(boxes, [0], [""])
    assert named[:38].any()
    assert not nameless[:40].any()
    np.testing.assert_array_equal(nameless[40:102, 50:152], named[40:102, 50:152])


def test_no_boxes_is_the_plain_image():
    assert not drawn(NO_BOXES, NO_LABELS, NAMES, NO_LABELS)[0].any()
    assert not drawn([], [], NAMES)[0].any()


def test_the_best_lie_on_top():
    boxes = np.array([[50, 40, 150, 100], [50, 40, 150, 100.0]])
    best = drawn(boxes[:1], [3], NAMES)[1]
    both = drawn(boxes, [3, 1], NAMES, np.array([0.9, 0.8]))[1]
    on_box = (slice(40, 101), slice(50, 151))
    np.testing.assert_array_equal(both[on_box], best[on_box])


@pytest.mark.parametrize(
    "box", [[90, 60, 98, 66], [2, 2, 9, 9], [190, 110, 199, 118], [0, 60, 6, 66], [90, 0, 97, 5]]
)
def test_the_tag_of_a_small_box_leaves_it_visible(box):
    changed, _ = drawn(np.array([box], np.float32), [0], NAMES)
    left, top, right, bottom = box
    assert not changed[top + 1 : bottom, left + 1 : right].any()
    tag = changed.copy()
    tag[top : bottom + 1, left : right + 1] = False
    assert tag.any()


def test_a_tag_avoids_other_boxes():
    """The place above the large box has a small one; the tag goes below."""
    boxes = np.array([[60, 30, 140, 90], [60, 18, 70, 26.0]])
    changed, _ = drawn(boxes, [0, 1], NAMES)
    assert not changed[19:26, 61:70].any()
    assert changed[92:, 60:80].any()


def test_a_box_without_room_beside_it_has_its_tag_inside():
    changed, _ = drawn(np.array([[0, 0, 199, 119.0]]), [0], NAMES)
    assert changed[3:12, 3:20].any()


def test_what_is_under_a_tag_shines_through():
    stripes = GREY.copy()
    stripes[:, ::2] = 0
    picture = np.asarray(draw_boxes(stripes, np.array([[50, 60, 150, 100.0]]), [0], NAMES))
    tag = picture[48:58, 51:70].astype(int)
    assert np.abs(tag[:, 1:] - tag[:, :-1]).max(axis=2).mean() > 5


def test_labels_and_scores_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        draw_boxes(GREY, np.zeros((2, 4)), [0, 1], NAMES, [0.5])


def test_sheet_has_ground_truth_at_left_and_detections_at_right(tmp_path):
    box, label, none = np.array([[20, 20, 100, 100.0]]), np.array([0]), np.zeros(0)
    tall = np.ascontiguousarray(GREY.transpose(1, 0, 2))
    examples = [
        Example(GREY, box, label, NO_BOXES, NO_LABELS, none),
        Example(tall, NO_BOXES, NO_LABELS, box, label, np.array([0.9])),
        Example(GREY, box, label, box, label, np.array([MIN_SCORE - 0.1])),
    ]
    draw_sheet(tmp_path / "sheet.png", examples, NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet.convert("RGB"), np.int64)
    coloured = np.ptp(pixels, axis=2) > 60
    seen = [
        [bool(panel.any()) for panel in np.array_split(half, 4, axis=1)]
        for half in np.array_split(coloured, 2)
    ]
    assert seen == [[True, False, False, True], [True, False, False, False]]
