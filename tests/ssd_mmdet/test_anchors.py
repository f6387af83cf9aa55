import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ssd_mmdet.anchors import anchors_per_cell, decode, encode, make_anchors
from ssd_mmdet.config import RECIPES

RECIPE = RECIPES["1p"]


def random_boxes(seed, count, smallest):
    """(count, 4) xyxy pixels inside the network input, sides from `smallest` to 300."""
    generator = torch.Generator().manual_seed(seed)
    size = smallest + (300 - smallest) * torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (300 - size)
    return torch.cat([corner, corner + size], dim=1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), smallest=st.sampled_from([6.0, 30.0, 100.0]))
def test_decode_undoes_encode(seed, smallest):
    anchors = make_anchors(RECIPE)
    boxes = random_boxes(seed, len(anchors), smallest)
    assert_close(decode(encode(boxes, anchors, RECIPE), anchors, RECIPE), boxes, rtol=0, atol=1e-3)
    batch = torch.stack([boxes, boxes.flip(0)])
    assert_close(encode(batch, anchors, RECIPE)[1], encode(boxes.flip(0), anchors, RECIPE))


def test_offsets_are_the_papers_with_variances():
    anchor, box = torch.tensor([40.0, 60, 60, 70]), torch.tensor([36.0, 60.5, 66, 65.5])
    expected = [10 * 1 / 20, 10 * -2 / 10, 5 * math.log(1.5), 5 * math.log(0.5)]
    assert_close(encode(box, anchor, RECIPE), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert_close(decode(torch.zeros(4), anchor, RECIPE), anchor)


def test_the_documented_example_without_the_ports_pixel_more():
    """The NPU operator adds 1 to sides and gives 13.328 here; the formula gives 20."""
    recipe = replace(RECIPE, center_variance=0.1)
    found = encode(torch.tensor([5.0, 6, 7, 8]), torch.tensor([1.0, 2, 3, 4]), recipe)
    assert_close(found, torch.tensor([20.0, 20, 0, 0]))


def test_a_box_without_size_has_finite_offsets():
    anchors = make_anchors(RECIPE)[::100]
    boxes = torch.tensor([90.0, 90, 90, 90]).expand(len(anchors), 4)
    assert encode(boxes, anchors, RECIPE).isfinite().all()


def test_decoded_boxes_are_limited_and_clipped():
    anchor = torch.tensor([[100.0, 100, 101, 101]])
    (grown,) = decode(torch.tensor([[0.0, 0, 1e4, 1e4]]), anchor, RECIPE)
    assert_close(grown, 100.5 + 31.25 * torch.tensor([-1.0, -1, 1, 1]))
    (shrunk,) = decode(torch.tensor([[0.0, 0, -1e4, -1e4]]), anchor, RECIPE)
    assert_close(shrunk[2] - shrunk[0], torch.tensor(1 / 62.5), rtol=1e-2, atol=0)
    (outside,) = decode(torch.tensor([[-1e6, 1e6, 0, 0]]), anchor, RECIPE)
    assert outside.tolist() == [0, 300, 0, 300]


def test_anchors_stand_in_the_order_of_the_outputs():
    anchors = make_anchors(RECIPE)
    assert anchors_per_cell(RECIPE) == (4, 6, 6, 6, 4, 4)
    second = anchors[5776 : 5776 + 2166].view(19, 19, 6, 4)  # row, column, shape
    center = (second[3, 5, :, :2] + second[3, 5, :, 2:]) / 2
    assert_close(center, torch.tensor([5.5 * 16, 3.5 * 16]).expand(6, 2))
    size = second[3, 5, :, 2:] - second[3, 5, :, :2]
    wide, tall = 45 * 2**0.5, 45 * 3**0.5
    between = (45 * 99) ** 0.5
    expected = [[45, 45], [between, between], [wide, 45 / 2**0.5], [45 / 2**0.5, wide]]
    expected += [[tall, 45 / 3**0.5], [45 / 3**0.5, tall]]
    assert_close(size, torch.tensor(expected))


def test_anchors_are_not_clipped():
    anchors = make_anchors(RECIPE)
    assert anchors.min() < -100
    assert anchors.max() > 400


@pytest.mark.parametrize(("name", "count"), [("1p", 8732), ("8p", 8732), ("ssd512", 24564)])
def test_number_of_anchors(name, count):
    assert make_anchors(RECIPES[name]).shape == (count, 4)
