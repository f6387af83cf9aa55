from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.errors import UserError
from ssd_mmdet.config import RECIPES
from ssd_mmdet.model import L2Norm, build_model

RECIPE = RECIPES["1p"]
THIN = {name: replace(RECIPES[name], width=1 / 16) for name in ("1p", "ssd512")}


def images(count, size=300):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "count"), [("1p", 34_305_206), ("ssd512", 36_038_196)])
def test_published_size(name, count):
    with torch.device("meta"):
        model = build_model(RECIPES[name], 80)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "maps"), [("1p", (38, 19, 10, 5, 3, 1)), ("ssd512", (64, 32, 16, 8, 4, 2, 1))]
)
def test_levels_and_outputs(name, maps):
    model, size = build_model(THIN[name], 7).eval(), THIN[name].image_size
    with torch.no_grad():
        levels = model.backbone(images(1, size))
        offsets, logits = model(images(1, size))
    assert [tuple(level.shape[2:]) for level in levels] == [(side, side) for side in maps]
    anchors = {"1p": 8732, "ssd512": 24564}[name]
    assert offsets.shape == (1, anchors, 4)
    assert logits.shape == (1, anchors, 8)


def test_unknown_image_size():
    with pytest.raises(UserError, match="image_size 400: not one of 300, 512"):
        build_model(replace(RECIPE, image_size=400), 80)


def test_head_channels_are_shape_then_output():
    model = build_model(THIN["1p"], 2).eval()
    head = model.bbox_head
    for conv in [*head.cls_convs, *head.reg_convs]:
        nn.init.zeros_(conv.weight)
        conv.bias.data = torch.arange(len(conv.bias), dtype=torch.float32)
    with torch.no_grad():
        outputs = model(images(1))
    for found, width in zip(outputs, (4, 3), strict=True):
        start = 0
        for shapes, cells in zip((4, 6, 6, 6, 4, 4), (38, 19, 10, 5, 3, 1), strict=True):
            level = found[0, start : start + shapes * cells**2].view(cells**2, shapes, width)
            channels = torch.arange(float(shapes * width)).view(shapes, width)
            assert torch.equal(level, channels.expand_as(level))
            start += shapes * cells**2
        assert start == 8732


def test_l2_norm_is_the_formula_in_fp32_and_keeps_the_dtype():
    norm, x = L2Norm(6), torch.randn(2, 6, 4, 5)
    norm.weight.data = torch.rand(6)
    expected = norm.weight.view(6, 1, 1) * x / (x.norm(dim=1, keepdim=True) + 1e-10)
    assert_close(norm(x), expected)
    small = (1e-3 * x).half()  # its squares would vanish in half precision
    assert norm(small).dtype == torch.float16
    assert_close(norm(small), norm(small.float()).half())
    assert torch.equal(norm(torch.zeros(1, 6, 2, 2)), torch.zeros(1, 6, 2, 2))


def test_a_batch_is_its_images_and_the_layout_does_not_matter():
    torch.manual_seed(0)
    model = build_model(THIN["1p"], 5).eval()
    with torch.no_grad():
        together = model(images(2))
        alone = [model(images(2)[n : n + 1]) for n in range(2)]
        last = model(images(2).contiguous(memory_format=torch.channels_last))
    for k in (0, 1):
        assert_close(torch.cat([one[k] for one in alone]), together[k], rtol=0, atol=2e-5)
        assert_close(last[k], together[k], rtol=0, atol=2e-5)


def test_autocast_gives_its_dtype_and_nearly_the_same():
    torch.manual_seed(0)
    model = build_model(THIN["1p"], 5).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        halves = model(images(1))
    with torch.no_grad():
        full = model(images(1))
    for half, expected in zip(halves, full, strict=True):
        assert half.dtype == torch.bfloat16
        assert (half.float() - expected).std() < 0.05 * expected.std()


def test_initial_weights():
    torch.manual_seed(0)
    model = build_model(RECIPE, 80)
    head = model.bbox_head
    for conv in [*head.cls_convs, *head.reg_convs, *model.backbone.extra]:
        area = conv.kernel_size[0] ** 2
        bound = (6 / (area * (conv.in_channels + conv.out_channels))) ** 0.5  # Xavier
        assert 0.99 * bound < conv.weight.abs().max() <= bound
        assert conv.bias.eq(0).all()
    for conv in [layer for layer in model.backbone.features if isinstance(layer, nn.Conv2d)]:
        fan_out = conv.kernel_size[0] ** 2 * conv.out_channels
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert conv.bias.eq(0).all()
    assert model.backbone.l2_norm.weight.eq(20).all()
