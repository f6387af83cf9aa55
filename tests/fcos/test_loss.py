import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fcos import loss
from fcos.anchors import map_sizes
from fcos.config import RECIPES
from fcos.loss import DetectionLoss, focal_loss, giou_loss, iou_loss
from fcos.model import Outputs


def paper_focal(logits, is_target, alpha=0.25):
    """The focal loss as its paper writes it."""
    p = logits.sigmoid()
    chance = torch.where(is_target, p, 1 - p)
    weight = torch.where(is_target, alpha, 1 - alpha) * (1 - chance) ** 2
    entropy = F.binary_cross_entropy_with_logits(logits, is_target.to(p.dtype), reduction="none")
    return weight * entropy


def test_focal_loss_equals_its_definition():
    random = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(2, 50, 9, generator=random, dtype=torch.float64)
    is_target = torch.rand(2, 50, 9, generator=random) < 0.1
    values, grads = [], []
    for function in (paper_focal, focal_loss):
        x = logits.clone().requires_grad_()
        value = function(x, is_target, 0.25)
        (3 * value).sum().backward()
        values.append(value)
        grads.append(x.grad)
    assert_close(values[1], values[0])
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("size", [30.0, 90.0, 1e4])
def test_focal_loss_of_extreme_logits_is_right(size):
    logits = torch.tensor([[[size, -size]]], requires_grad=True)
    for label, expected in ((0, 0.0), (1, (0.75 + 0.25) * size)):
        logits.grad = None
        is_target = torch.arange(2) == torch.tensor([[[label]]])
        value = focal_loss(logits, is_target, 0.25).sum()
        value.backward()
        assert value.item() == pytest.approx(expected, abs=1e-6)
        gradient = [0.0, 0.0] if label == 0 else [0.75, -0.25]
        assert_close(logits.grad[0, 0], torch.tensor(gradient))


def random_boxes(count):
    random = torch.Generator().manual_seed(1)
    return (4 * torch.randn(2, count, 4, generator=random)).exp()


def test_iou_and_giou_are_torchvisions():
    ops = pytest.importorskip("torchvision.ops")
    one, other = random_boxes(50)
    boxes = [torch.cat([-x[:, :2], x[:, 2:]], dim=1) for x in (one, other)]
    iou = torch.stack([ops.box_iou(a[None], b[None])[0, 0] for a, b in zip(*boxes, strict=True)])
    assert_close(iou_loss(one, other), -iou.clamp(min=1e-6).log(), rtol=1e-5, atol=1e-5)
    giou = ops.generalized_box_iou_loss(*boxes)
    assert_close(giou_loss(one, other), giou, rtol=1e-5, atol=1e-5)


def outputs_for(recipe, distance=8.0, height=64, width=64):
    sizes = map_sizes(recipe, height, width)

    def maps(channels, value):
        return tuple(torch.full((1, channels, *size), value).requires_grad_() for size in sizes)

    return Outputs(maps(3, -2.0), maps(4, distance), maps(1, 0.5))


def truth(*boxes, slots=4):
    padded = torch.zeros(1, slots, 4)
    padded[0, : len(boxes)] = torch.tensor(boxes).view(-1, 4)
    valid = torch.arange(slots).view(1, -1) < len(boxes)
    return padded, torch.ones(1, slots, dtype=torch.int64), valid


@pytest.mark.parametrize("name", ["gn", "tricks"])
def test_background_points_may_have_any_distance(name):
    """The port multiplies by a mask after the logarithm: inf * 0 is nan."""
    outputs = outputs_for(RECIPES[name], float("inf"))
    with torch.no_grad():
        outputs.distances[0][..., 2:6, 2:6] = 5.0
    losses = DetectionLoss(RECIPES[name], 3)(outputs, *truth((18.0, 18.0, 45.0, 45.0)))
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(x.grad.isfinite().all() for maps in outputs for x in maps)
    assert losses["loss_bbox"] > 0


def test_without_any_box_every_output_has_a_gradient(recipe):
    """Zero for boxes and centerness, but there: ranks wait for every parameter."""
    outputs = outputs_for(recipe)
    losses = DetectionLoss(recipe, 3)(outputs, *truth())
    losses["loss"].backward()
    assert losses["loss_bbox"] == losses["loss_centerness"] == 0
    assert losses["loss_cls"] > 0
    for maps, some in zip(outputs, (True, False, False), strict=True):
        assert all(x.grad is not None and bool(x.grad.any()) is some for x in maps)


def test_padding_changes_nothing(recipe):
    box = (10.0, 12.0, 50.0, 60.0)
    found = [
        DetectionLoss(recipe, 3)(outputs_for(recipe), *truth(box, slots=slots)) for slots in (1, 16)
    ]
    assert found[0] == found[1]


def test_losses_are_fp32_whatever_the_outputs_are(recipe):
    outputs = outputs_for(recipe)
    half = Outputs(*(tuple(x.bfloat16() for x in maps) for maps in outputs))
    losses = DetectionLoss(recipe, 3)(half, *truth((10.0, 12.0, 50.0, 60.0)))
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert_close(losses, DetectionLoss(recipe, 3)(outputs, *truth((10.0, 12.0, 50.0, 60.0))))


def test_one_collective_whatever_the_boxes(recipe, monkeypatch):
    calls = []
    monkeypatch.setattr(loss.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loss.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(loss.dist, "all_reduce", lambda x: calls.append(tuple(x.shape)))
    for boxes in ((), ((10.0, 12.0, 50.0, 60.0),)):
        DetectionLoss(recipe, 3)(outputs_for(recipe), *truth(*boxes))
    assert calls == [(2,), (2,)]
