from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.errors import UserError
from fcos.anchors import map_sizes
from fcos.backbone import make_backbone
from fcos.config import RECIPES
from fcos.loss import DetectionLoss
from fcos.model import LARGEST_EXPONENT, build_model, param_groups

SMALL = {"backbone": "resnet14", "channels": 64, "tower_convs": 1}


def small(name="gn", **fields):
    torch.manual_seed(0)
    return build_model(replace(RECIPES[name], **SMALL, **fields), 3)


@pytest.mark.parametrize(
    ("name", "trained", "doubled"),
    [("gn", 32_019_802, 11), ("nogn", 32_017_754, 19), ("tricks", 32_021_850, 19)],
)
def test_published_size_and_groups(name, trained, doubled):
    model = build_model(RECIPES[name], 80)
    if name == "gn":
        parameters = list(model.parameters())
        assert (len(parameters), sum(p.numel() for p in parameters)) == (210, 32_295_322)
    model.backbone.freeze()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    others, biases = param_groups(model, RECIPES[name])
    assert (biases["lr_factor"], biases["weight_decay"]) == (2.0, 0.0)
    assert len(biases["params"]) == doubled
    assert len(others["params"]) + doubled == sum(p.requires_grad for p in model.parameters())
    if name == "gn":
        assert len(others["params"]) == 82


@pytest.mark.parametrize("name", ["gn", "nogn", "tricks"])
def test_shapes_and_types_of_the_outputs(name):
    recipe = RECIPES[name]
    images = torch.zeros(2, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = small(name)(images)
    assert outputs.map_sizes() == map_sizes(recipe, 64, 96)
    for maps, channels in zip(outputs, (3, 4, 1), strict=True):
        assert [x.shape[:2] for x in maps] == [(2, channels)] * 5
    assert {x.dtype for x in outputs.distances} == {torch.float32}
    assert {x.dtype for x in outputs.logits} == {torch.bfloat16}
    points = sum(rows * columns for rows, columns in outputs.map_sizes())
    assert [tuple(x.shape) for x in outputs.flat()] == [(2, points, c) for c in (3, 4, 1)]
    assert {x.dtype for x in outputs.flat()} == {torch.float32}


def test_a_new_network_starts_from_the_prior_probability():
    with torch.no_grad():
        outputs = small()(torch.randn(1, 3, 64, 64))
    found = torch.cat([x.sigmoid().flatten() for x in outputs.logits])
    assert found.mean().item() == pytest.approx(0.01, rel=0.1)
    assert found.max() < 0.02


def test_a_new_network_trains_everything_and_its_residual_branches_start_at_zero():
    model = small().train()
    assert all(p.requires_grad for p in model.parameters())
    norms = {key: m for key, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(norm.training for norm in norms.values())
    for key, norm in norms.items():
        assert bool(norm.weight.any()) is not key.endswith("bn3")
    before = model.backbone.bn1.running_mean.clone()
    model(torch.randn(2, 3, 64, 64))
    assert not torch.equal(model.backbone.bn1.running_mean, before)


def test_a_frozen_backbone_stays_frozen_through_training_and_evaluation():
    model = small()
    model.backbone.freeze()
    for mode in (True, False, True):
        model.train(mode)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not any(norm.training for norm in norms)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert {key for key in frozen if "bn" not in key and "downsample.1" not in key} == {
        key
        for key, _ in model.named_parameters()
        if key == "backbone.conv1.weight"
        or (key.startswith("backbone.layer1.") and ("conv" in key or "downsample.0" in key))
    }


@pytest.mark.parametrize("boxes", [True, False])
def test_every_trained_tensor_gets_a_gradient(boxes):
    """Without positives too: ranks would wait for it."""
    model = small()
    model.backbone.freeze()
    model.train()
    truth = torch.tensor([[[4.0, 4.0, 60.0, 50.0]]]), torch.zeros(1, 1, dtype=torch.int64)
    losses = DetectionLoss(RECIPES["gn"], 3)(
        model(torch.randn(1, 3, 64, 64)), *truth, torch.tensor([[boxes]])
    )
    losses["loss"].backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, key


def test_fixed_batch_norm_in_the_convolution_is_the_same_function():
    torch.manual_seed(0)
    backbone = make_backbone("resnet14")
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(1, 3, 64, 64)
    backbone.eval()
    found = backbone(images)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = lambda x, m=module: nn.functional.batch_norm(
                x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps
            )
            module.training = True  # takes its own path
    for one, other in zip(found, backbone(images), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_exponent_out_of_range_has_a_finite_distance_and_gradient():
    head = small().bbox_head
    x = torch.zeros(1, 64, 2, 2, requires_grad=True)
    nn.init.constant_(head.conv_reg.bias, 1e4)
    _, distances, _ = head.predict(x, head.scales[0].scale)
    assert_close(distances, torch.full_like(distances, LARGEST_EXPONENT).exp())
    (0 * distances).sum().backward()
    assert all(p.grad.isfinite().all() for p in (head.conv_reg.weight, head.scales[0].scale))


def test_unknown_backbone():
    with pytest.raises(UserError, match="vgg16"):
        build_model(replace(RECIPES["gn"], backbone="vgg16"), 80)
