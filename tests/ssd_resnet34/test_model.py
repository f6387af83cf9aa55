from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.errors import UserError
from ssd_resnet34.config import RECIPES
from ssd_resnet34.model import build_model

RECIPE = RECIPES["1p"]
SOURCES = {
    "resnet18": (256, 512, 512, 256, 256, 128),
    "resnet34": (256, 512, 512, 256, 256, 256),
    "resnet50": (1024, 512, 512, 256, 256, 256),
}


@pytest.fixture
def images():
    return torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backbone", SOURCES)
def test_outputs_and_sources_of_each_backbone(backbone, images):
    model = build_model(replace(RECIPE, backbone=backbone), 7)
    assert tuple(head.in_channels for head in model.mbox) == SOURCES[backbone]
    assert [head.out_channels for head in model.mbox] == [12 * d for d in (4, 6, 6, 6, 4, 4)]
    with torch.no_grad():
        deltas, logits = model.eval()(images[:1])
        assert model.model(images[:1]).shape == (1, SOURCES[backbone][0], 38, 38)
    assert deltas.shape == (1, 4, 8732)
    assert logits.shape == (1, 8, 8732)


def test_published_size():
    model = build_model(RECIPE, 80)
    assert sum(parameter.numel() for parameter in model.parameters()) == 19_972_534
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


def test_unknown_backbone():
    with pytest.raises(UserError, match="vgg16"):
        build_model(replace(RECIPE, backbone="vgg16"), 80)


def test_head_channels_are_class_or_coordinate_then_shape(images):
    model = build_model(replace(RECIPE, backbone="resnet18"), 2).eval()
    for head in model.mbox:
        nn.init.zeros_(head.weight)
        head.bias.data = torch.arange(len(head.bias), dtype=torch.float32)
    with torch.no_grad():
        deltas, logits = model(images[:1])
    start = 0
    for shapes, cells in zip((4, 6, 6, 6, 4, 4), (38, 19, 10, 5, 3, 1), strict=True):
        level = slice(start, start + shapes * cells**2)
        channels = torch.arange(7.0 * shapes).view(7, shapes)  # 3 class channels, 4 coordinates
        found = torch.cat([logits[0, :, level], deltas[0, :, level]]).view(7, shapes, -1)
        assert torch.equal(found, channels.unsqueeze(-1).expand_as(found))
        start = level.stop
    assert start == 8732


def test_a_batch_is_its_images_and_the_layout_does_not_matter(filled_model, images):
    with torch.no_grad():
        together = filled_model(images)
        alone = [filled_model(images[n : n + 1]) for n in range(2)]
        last = filled_model(images.contiguous(memory_format=torch.channels_last))
    for k in (0, 1):
        assert_close(torch.cat([one[k] for one in alone]), together[k], rtol=0, atol=2e-5)
        assert_close(last[k], together[k], rtol=0, atol=2e-5)


@pytest.mark.again
def test_autocast_gives_its_dtype_and_nearly_the_same(filled_model, images):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        halves = filled_model(images[:1])
    with torch.no_grad():
        full = filled_model(images[:1])
    for half, expected in zip(halves, full, strict=True):
        assert half.dtype == torch.bfloat16
        assert (half.float() - expected).std() < 0.05 * expected.std()


def test_initial_weights():
    torch.manual_seed(0)
    model = build_model(RECIPE, 80)
    for conv in [*model.mbox, *(block[k] for block in model.additional_blocks for k in (0, 2))]:
        area = conv.kernel_size[0] ** 2
        bound = (6 / (area * (conv.in_channels + conv.out_channels))) ** 0.5  # Xavier
        assert 0.99 * bound < conv.weight.abs().max() <= bound
        bound = (area * conv.in_channels) ** -0.5  # PyTorch's own
        assert 0.8 * bound < conv.bias.abs().max() <= bound
    for conv in [module for module in model.model.modules() if isinstance(module, nn.Conv2d)]:
        fan_out = conv.kernel_size[0] ** 2 * conv.out_channels
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
