"""Pictures of training samples: what matches a box is counted, drawn and, if nothing, noticed."""

import numpy as np
import torch
from PIL import Image

from common.coco.draw import class_colour
from common.coco.look import (
    ALARM_COLOUR,
    NOT_FINITE,
    PANEL_SIDE,
    SAMPLES_A_PAGE,
    Sample,
    draw_pages,
    draw_pair,
    make_samples,
)

NAMES = ("person", "car")
GREY = np.full((100, 200, 3), 128, np.uint8)
ANCHORS = np.array([[30, 20, 90, 80], [35, 25, 95, 85]], np.float32)
BOXES = np.array([[40, 30, 90, 90], [120, 30, 160, 70]], np.float32)
# Rows of the panels in a pair, below the title.
TITLE = 21


def sample(matches=(ANCHORS, ANCHORS[:0]), **changes):
    fields = {
        "image": GREY,
        "boxes_xyxy": BOXES,
        "labels": np.array([1, 0]),
        "matches": list(matches),
        "image_id": 7,
        "file": "folder/a.jpg",
    }
    return Sample(**{**fields, **changes})


def pixels_of(pair, colour):
    """Where a picture has a colour (H, W) bool, but for rounding."""
    red, green, blue = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    return (np.abs(np.asarray(pair, np.int64) - (red, green, blue)) < 12).all(axis=2)


def test_a_line_says_the_matches_and_the_losses_of_an_image():
    line = sample(losses={"loss_cls": 2.5, "loss": float("nan")}).line(NAMES)
    assert line == (
        "image 7; folder/a.jpg; 2 boxes with their matches: car 2, person 0; "
        "loss_cls 2.5, loss nan not finite"
    )
    empty = sample([], boxes_xyxy=BOXES[:0], labels=np.zeros(0, int), file="")
    assert empty.line(NAMES) == "image 7; 0 boxes"
    one = sample([ANCHORS], boxes_xyxy=BOXES[:1], labels=np.zeros(1, int), file="")
    assert one.line(NAMES) == "image 7; 1 box with their matches: person 2"


def test_anchors_are_drawn_at_right_and_boxes_on_both_sides():
    pair = draw_pair(sample(), NAMES)
    scale = PANEL_SIDE / 200
    left = np.asarray(pair)[TITLE : TITLE + 224, :PANEL_SIDE].astype(int)
    right = np.asarray(pair)[TITLE : TITLE + 224, -PANEL_SIDE:].astype(int)

    def is_red(panel, x, y):
        red, green, blue = panel[round(y * scale), round(x * scale)]
        return red > green + 60 and red > blue + 60

    for panel in (left, right):
        assert is_red(panel, 90, 60)  # the right side of the first box, whose colour is red
    assert is_red(right, 60, 80)  # the lower side of an anchor
    assert not is_red(left, 60, 80)
    assert (np.abs(left[60:165, 260:365] - 128) > 60).any()  # the second box
    dimmed = right[200, 440]
    assert (dimmed == 64).all()


def test_points_are_drawn_as_dots():
    points = np.array([[60.0, 50.0]], np.float32)
    pair = draw_pair(sample([points, points[:0]]), NAMES)
    scale = PANEL_SIDE / 200
    red, green, blue = pair.getpixel(
        (pair.width - PANEL_SIDE + round(60 * scale), TITLE + round(50 * scale))
    )
    assert red > green + 40
    assert red > blue + 40


def test_a_box_without_a_match_and_a_loss_that_is_not_finite_are_written_in_red():
    def has_alarm(one):
        return pixels_of(draw_pair(one, NAMES), ALARM_COLOUR)[TITLE + 230 :].any()

    matched = sample([ANCHORS, ANCHORS])
    assert not has_alarm(matched)
    assert has_alarm(sample())
    assert not has_alarm(matched._replace(losses={"loss": 1.0}))
    assert has_alarm(matched._replace(losses={"loss": float("inf")}))
    assert NOT_FINITE in matched._replace(losses={"loss": float("inf")}).line(NAMES)


def test_hundreds_of_boxes_take_a_few_lines():
    count = 300
    crowded = sample(
        [ANCHORS] * count, boxes_xyxy=np.tile(BOXES[:1], (count, 1)), labels=np.zeros(count, int)
    )
    assert draw_pair(crowded, NAMES).height < TITLE + 224 + 5 * TITLE + 10


def test_pages_are_written_whole_and_those_of_a_longer_series_deleted(tmp_path):
    count = SAMPLES_A_PAGE + 1
    paths = list(draw_pages([sample()] * count, NAMES, tmp_path / "look", "epoch_1"))
    assert [path.name for path in paths] == ["epoch_1_1.jpg", "epoch_1_2.jpg"]
    other = tmp_path / "look" / "epoch_2_2.jpg"
    other.touch()
    with Image.open(paths[0]) as page:
        first = page.size
    with Image.open(paths[1]) as page:
        assert page.width == first[0]
        assert page.height < first[1] / 4
        assert pixels_of(page, class_colour(0)).any()
    list(draw_pages([sample()], NAMES, tmp_path / "look", "epoch_1"))
    assert sorted(tmp_path.glob("look/*")) == [paths[0], other]


def test_samples_of_a_batch_have_their_boxes_and_matches():
    pixels = torch.full((2, 3, 4, 6), 100.4)
    pixels[0, 0] = 300.0
    pixels[1, 2] = -20.0
    boxes = torch.tensor([[[0, 0, 2, 2], [1, 1, 3, 3]], [[0, 0, 1, 1], [0, 0, 0, 0]]]).float()
    labels = torch.tensor([[1, 0], [1, 0]])
    valid = torch.tensor([[True, True], [True, False]])
    anchors = torch.arange(12).view(3, 4).float()
    positive = torch.tensor([[True, False, True], [True, False, False]])
    matched = torch.tensor([[1, 0, 1], [0, 1, 1]])
    image_ids = torch.tensor([5, 6])
    first, second = make_samples(
        pixels, boxes, labels, valid, image_ids, anchors, positive, matched
    )
    assert first.image.shape == (4, 6, 3)
    assert first.image[0, 0].tolist() == [255, 100, 100]
    assert second.image[0, 0].tolist() == [100, 100, 0]
    assert (first.image_id, second.image_id) == (5, 6)
    assert [len(matches) for matches in first.matches] == [0, 2]
    assert first.matches[1].tolist() == anchors[[0, 2]].tolist()
    assert second.boxes_xyxy.tolist() == [[0, 0, 1, 1]]
    assert second.labels.tolist() == [1]
    assert [len(matches) for matches in second.matches] == [1]
