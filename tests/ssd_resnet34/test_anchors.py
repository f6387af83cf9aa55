import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ssd_resnet34.anchors import (
    anchors_per_cell,
    decode,
    encode,
    make_anchors,
    to_cxcywh,
    to_xyxy,
)
from ssd_resnet34.config import RECIPES

RECIPE = RECIPES["1p"]


def random_boxes(seed, count, smallest):
    """(count, 4) normalised xyxy inside the image."""
    generator = torch.Generator().manual_seed(seed)
    size = smallest + (1 - smallest) * torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (1 - size)
    return torch.cat([corner, corner + size], dim=1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), smallest=st.sampled_from([1e-3, 0.02, 0.3]))
def test_decode_undoes_encode(seed, smallest):
    anchors = make_anchors(RECIPE)
    boxes = to_cxcywh(random_boxes(seed, len(anchors), smallest))
    assert_close(decode(encode(boxes, anchors, RECIPE), anchors, RECIPE), boxes, rtol=0, atol=2e-6)
    batch = torch.stack([boxes, boxes.flip(0)])
    assert_close(encode(batch, anchors, RECIPE)[1], encode(boxes.flip(0), anchors, RECIPE))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_box_forms_are_inverse(seed):
    boxes = random_boxes(seed, 50, 1e-3)
    assert_close(to_xyxy(to_cxcywh(boxes)), boxes, rtol=0, atol=2e-7)
    left, top, right, bottom = boxes.unbind(-1)
    expected = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    assert_close(to_cxcywh(boxes), torch.stack(expected, dim=-1))


def test_deltas_are_the_papers_with_variances():
    anchor, box = torch.tensor([0.5, 0.4, 0.2, 0.1]), torch.tensor([0.51, 0.38, 0.3, 0.05])
    expected = [10 * 0.01 / 0.2, 10 * -0.02 / 0.1, 5 * math.log(1.5), 5 * math.log(0.5)]
    assert_close(encode(box, anchor, RECIPE), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert_close(decode(torch.zeros(4), anchor, RECIPE), anchor)
    wide = replace(RECIPE, center_variance=1.0, size_variance=1.0)
    divided = torch.tensor(expected) / torch.tensor([10, 10, 5, 5])
    assert_close(encode(box, anchor, wide), divided, rtol=1e-5, atol=1e-5)


def test_a_box_without_size_has_finite_deltas():
    anchors = make_anchors(RECIPE)[::100]
    boxes = torch.tensor([0.3, 0.3, 0.0, 0.0]).expand(len(anchors), 4)
    assert encode(boxes, anchors, RECIPE).isfinite().all()


def test_anchors_stand_in_the_order_of_the_outputs():
    anchors = make_anchors(RECIPE)
    assert anchors_per_cell(RECIPE) == (4, 6, 6, 6, 4, 4)
    second = anchors[5776 : 5776 + 2166].view(6, 19, 19, 4)  # shape, row, column
    assert_close(second[0, 3, 5, :2], torch.tensor([5.5, 3.5]) * 16 / 300)
    assert_close(second[0, 0, 0, 2:], torch.tensor([45.0, 45.0]) / 300)
    assert_close(second[1, 0, 0, 2], torch.tensor(math.sqrt(45 * 99) / 300))
    assert_close(second[4, 0, 0, 2:], torch.tensor([45 * 3**0.5, 45 / 3**0.5]) / 300)
    assert_close(second[5, 0, 0, 2:], second[4, 0, 0, 2:].flip(0))
    assert (second[:, :, :, 2:] == second[:, :1, :1, 2:]).all()


def test_anchors_are_clamped_to_the_image():
    third = make_anchors(RECIPE)[7942 : 7942 + 600].view(6, 10, 10, 4)
    assert 9.5 * 32 / 300 > 1
    assert (third[:, :, 9, 0] == 1).all()
    assert (third[:, 9, :, 1] == 1).all()
    assert make_anchors(RECIPE).max() == 1


@pytest.mark.parametrize("step", [4.0, 7.5])
def test_anchors_follow_the_recipe(step):
    recipe = replace(
        RECIPE,
        anchor_maps=(2,),
        anchor_steps=(step,),
        anchor_sizes=(30, 60),
        anchor_ratios=((2,),),
    )
    anchors = make_anchors(recipe)
    assert anchors.shape == (16, 4)
    centers = torch.tensor([0.5, 1.5]) * step / 300
    assert_close(anchors[:2, 0], centers)
    assert_close(anchors[[0, 2], 1], centers)
