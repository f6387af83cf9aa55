from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2det.anchors import make_anchors, to_xyxy
from m2det.config import RECIPES
from m2det.targets import assign, pairwise_iou

GRID = 16  # corners are multiples of 1/16: IoUs are exact, so that ties and 1/2 do occur
GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30, -3.0, 0.0)


def iou(a, b):
    """Exact IoU of two boxes of integers, 0 where nothing is shared."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return Fraction(shared, areas - shared) if shared else Fraction(0)


def by_definition(anchors, boxes, match_iou):
    """{anchor: ground truth}: every anchor takes its best ground truth, the first of equals, from
    `match_iou` on; then every ground truth its best anchor, a later one overriding."""
    matched = {}
    for p, anchor in enumerate(anchors):
        overlaps = [iou(box, anchor) for box in boxes]
        if overlaps and max(overlaps) >= match_iou:
            matched[p] = overlaps.index(max(overlaps))
    for g, box in enumerate(boxes):
        overlaps = [iou(box, anchor) for anchor in anchors]
        matched[overlaps.index(max(overlaps))] = g
    return matched


@st.composite
def grid_boxes(draw, least, most, largest=GRID):
    boxes = []
    for _ in range(draw(st.integers(least, most))):
        width, height = draw(st.integers(1, largest)), draw(st.integers(1, largest))
        x, y = draw(st.integers(0, GRID - width)), draw(st.integers(0, GRID - height))
        boxes.append((x, y, x + width, y + height))
    return boxes


def as_tensor(boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / GRID


@settings(max_examples=60, deadline=None)
@given(boxes=grid_boxes(1, 8), anchors=grid_boxes(1, 8))
def test_iou_is_the_definition(boxes, anchors):
    found = pairwise_iou(as_tensor(boxes).unsqueeze(0), as_tensor(anchors))
    expected = [[float(iou(box, anchor)) for anchor in anchors] for box in boxes]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@st.composite
def scenes(draw):
    """Anchors, and images of up to 5 boxes scattered over 7 rows, garbage in the others."""
    anchors = draw(grid_boxes(3, 20, largest=6))
    images = []
    for _ in range(draw(st.integers(1, 3))):
        boxes = draw(grid_boxes(0, 5, largest=6))
        boxes += draw(st.lists(st.sampled_from(boxes), max_size=2)) if boxes else []
        rows = sorted(draw(st.permutations(range(7)))[: len(boxes)])
        garbage = draw(st.lists(st.sampled_from(GARBAGE), min_size=28, max_size=28))
        images.append((boxes, rows, garbage))
    return anchors, images


def padded(images):
    boxes = torch.stack([torch.tensor(garbage).view(7, 4) for *_, garbage in images])
    labels = torch.full((len(images), 7), -(10**12))
    valid = torch.zeros(len(images), 7, dtype=torch.bool)
    for n, (real, rows, _) in enumerate(images):
        boxes[n, rows] = as_tensor(real)
        labels[n, rows] = torch.arange(len(real)) + 10 * n
        valid[n, rows] = True
    return boxes, labels, valid


@settings(max_examples=150, deadline=None)
@given(scene=scenes(), match_iou=st.sampled_from([0.5, 0.25]))
def test_assign_is_the_definition_wherever_the_padding_lies(scene, match_iou):
    anchors, images = scene
    positive, matched, label = assign(as_tensor(anchors), *padded(images), match_iou)
    for n, (boxes, rows, _) in enumerate(images):
        expected = by_definition(anchors, boxes, match_iou)
        found = positive[n].nonzero().squeeze(1).tolist()
        assert found == sorted(expected)
        assert [matched[n, p].item() for p in found] == [rows[expected[p]] for p in found]
        assert [label[n, p].item() for p in found] == [expected[p] + 10 * n for p in found]


def test_an_overlap_of_exactly_the_limit_is_positive():
    anchors = [(0, 0, 4, 4), (0, 0, 4, 8), (0, 0, 4, 9)]
    assert iou(anchors[0], anchors[1]) == Fraction(1, 2)
    positive, *_ = assign(as_tensor(anchors), *padded([([anchors[0]], [3], [0.0] * 28)]), 0.5)
    assert positive.tolist() == [[True, True, False]]


def test_of_two_claims_the_later_wins_and_the_earlier_has_none():
    anchors = [(0, 0, 4, 4), (8, 8, 16, 16)]
    boxes = [(0, 0, 4, 3), (0, 0, 3, 4), (8, 8, 16, 15)]
    batch = padded([(boxes, [0, 1, 2], [0.0] * 28)])
    positive, matched, label = assign(as_tensor(anchors), *batch, 0.5)
    assert positive.tolist() == [[True, True]]
    assert matched.tolist() == label.tolist() == [[1, 2]]


def test_a_small_box_in_many_equal_anchors_takes_the_one_that_torchvision_finds():
    """Equal but for rounding: the winner depends on the order of operations in fp32."""
    box_iou = pytest.importorskip("torchvision.ops").box_iou
    anchors = to_xyxy(make_anchors(RECIPES["512_vgg"]))
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(60, 2, generator=generator) * 0.95
    boxes = torch.cat([low, low + 0.02 * torch.rand(60, 2, generator=generator)], dim=1)
    expected = box_iou(boxes, anchors)
    assert torch.equal(pairwise_iou(boxes.unsqueeze(0), anchors)[0], expected)
