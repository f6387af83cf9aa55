import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.errors import UserError
from m2det.anchors import make_anchors
from m2det.backbone import make_backbone
from m2det.config import RECIPES
from m2det.model import SFAM, BasicConv, Leach, build_model

SMALL = replace(RECIPES["320_vgg"], backbone="vgg16_thin", planes=16, num_levels=3)


@pytest.mark.parametrize("sfam", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_outputs_have_a_row_for_every_anchor(name, sfam):
    recipe = replace(RECIPES[name], sfam=sfam)
    with torch.device("meta"):
        model = build_model(recipe, 7)
        images = torch.zeros(2, 3, recipe.image_size, recipe.image_size)
        deltas, logits = model(images)
    anchors = len(make_anchors(recipe))
    assert deltas.shape == (2, anchors, 4)
    assert logits.shape == (2, anchors, 8)


def test_parameters_are_the_originals():
    with torch.device("meta"):
        model = build_model(RECIPES["512_vgg"], 80)
        resnet = build_model(RECIPES["320_resnet101"], 80)
    assert sum(p.numel() for p in model.parameters()) == 132_633_140
    assert len(list(model.parameters())) == 449
    # The unused classifier is kept for its keys alone: nothing waits for its gradient.
    frozen = {name for name, p in resnet.named_parameters() if not p.requires_grad}
    assert frozen == {"base.fc.weight", "base.fc.bias"}


def test_every_trained_parameter_gets_a_gradient():
    model = build_model(replace(SMALL, sfam=True), 3).train()
    deltas, logits = model(torch.randn(2, 3, 320, 320))
    (deltas.square().mean() + logits.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    base = make_backbone("resnet50").train()
    sum(tap.square().mean() for tap in base(torch.randn(2, 3, 64, 64))).backward()
    assert {n for n, p in base.named_parameters() if p.grad is None} == {"fc.weight", "fc.bias"}


def test_the_leach_module_once_is_the_originals_many_times():
    torch.manual_seed(0)
    once = Leach(6, 4, uses=8).double().train()  # in fp32 the sums' order would matter
    many = BasicConv(6, 4, 1).double().train()
    many.load_state_dict(once.state_dict())
    for _ in range(3):
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        single, repeated = once(x), [many(x) for _ in range(8)]
        assert_close(single, repeated[-1])
        gradients = [
            torch.autograd.grad(sum(o.square().sum() for o in outputs), module.conv.weight)[0]
            for outputs, module in (([single] * 8, once), (repeated, many))
        ]
        assert_close(*gradients)
    for key in ("bn.running_mean", "bn.running_var"):
        assert_close(once.state_dict()[key], many.state_dict()[key])


@pytest.mark.parametrize("backbone", ["vgg16_thin", "resnet50"])
def test_every_batch_norm_counts_the_batches(backbone):
    """One for each call of the original's module, as `nn.BatchNorm2d` does by itself."""
    model = build_model(replace(SMALL, backbone=backbone), 3).train()
    images = torch.randn(2, 3, 320, 320)
    with torch.no_grad():
        model(images)
        model(images)
        model.eval()(images)
    counts = {k: v.item() for k, v in model.state_dict().items() if k.endswith("batches_tracked")}
    assert len(counts) > 40
    for key, count in counts.items():
        calls = 3 if key.startswith("leach") else 1  # for each of three levels
        assert count == 2 * calls, key


def test_the_leach_module_is_computed_once():
    model = build_model(SMALL, 3)
    calls = []
    model.leach[0].register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 320, 320))
    assert len(calls) == 1
    assert len({id(module) for module in model.leach}) == 1
    assert {
        key for key in model.state_dict() if key.endswith("conv.weight") and "leach" in key
    } == {f"leach.{k}.conv.weight" for k in range(3)}


def test_sfam_weighs_channels_by_squeeze_and_excitation():
    torch.manual_seed(0)
    module = SFAM(32, 2)
    sources = [torch.randn(2, 32, 4, 4), torch.randn(2, 32, 1, 1)]
    for source, found in zip(sources, module(sources), strict=True):
        weights = nn.functional.adaptive_avg_pool2d(source, 1)
        weights = torch.sigmoid(module.fc2[1](torch.relu(module.fc1[1](weights))))
        assert_close(found, source * weights)


def test_initialisation():
    torch.manual_seed(0)
    model = build_model(replace(SMALL, planes=64), 3)
    for head in [*model.loc, *model.conf]:
        assert head.bias.eq(0).all()
        bound = (head.in_channels * 9) ** -0.5  # PyTorch's default
        assert 0.95 * bound < head.weight.abs().max() <= bound
    conv = model.unet2.layers[1].conv
    assert conv.weight.std().item() == pytest.approx((2 / (conv.out_channels * 9)) ** 0.5, rel=0.05)
    assert model.unet2.layers[1].bn.momentum == 0.01
    assert model.Norm.momentum == 0.1


def test_momentum_of_bn_is_the_recipes():
    model = build_model(replace(SMALL, bn_momentum=0.1), 3)
    assert model.unet1.layers[0].bn.momentum == model.reduce.bn.momentum == 0.1
    assert model.leach[0].bn.momentum == pytest.approx(1 - 0.9**SMALL.num_levels)


def test_without_smoothing():
    smooth, plain = (build_model(replace(SMALL, smooth=value), 3) for value in (True, False))
    missing = set(smooth.state_dict()) - set(plain.state_dict())
    assert missing
    assert all(".smooth." in key for key in missing)
    assert plain(torch.randn(2, 3, 320, 320))[0].shape == (2, 12810, 4)


def test_channels_last_and_a_copy_give_the_same():
    torch.manual_seed(0)
    model = build_model(SMALL, 3).eval()
    images = torch.randn(1, 3, 320, 320)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for a, b in zip(
            model(images), other(images.to(memory_format=torch.channels_last)), strict=True
        ):
            assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_unknown_backbone():
    with pytest.raises(UserError, match="vgg19"):
        build_model(replace(SMALL, backbone="vgg19"), 3)
