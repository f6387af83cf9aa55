from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ssd_mmdet.anchors import encode
from ssd_mmdet.config import RECIPES
from ssd_mmdet.loss import DetectionLoss
from ssd_mmdet.targets import assign

RECIPE = RECIPES["1p"]
CLASSES = 4
MAX_BOXES = 8
CRITERION = DetectionLoss(RECIPE, CLASSES)


def batch(seed, images, boxes=None):
    """Outputs that want gradients, and ground truth with some of its rows padding."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(images, 8732, 4, generator=generator).requires_grad_()
    logits = (3 * torch.randn(images, 8732, CLASSES + 1, generator=generator)).requires_grad_()
    corner = 180 * torch.rand(images, MAX_BOXES, 2, generator=generator)
    size = 15 + 105 * torch.rand(images, MAX_BOXES, 2, generator=generator)
    labels = torch.randint(0, CLASSES, (images, MAX_BOXES), generator=generator)
    valid = torch.rand(images, MAX_BOXES, generator=generator) < 0.6
    if boxes is not None:
        valid = torch.arange(MAX_BOXES).expand(images, MAX_BOXES) < boxes
    return (offsets, logits), (torch.cat([corner, corner + size], dim=2), labels, valid)


def by_formula(outputs, boxes, labels, valid):
    """MMDetection's SSD loss in words, image by image, in float64."""
    class_loss, box_loss, count = 0, 0, 0
    positive, matched, label = assign(CRITERION.anchors, boxes, labels, valid, 0.5)
    for n in range(len(boxes)):
        offsets, logits = (output[n].double() for output in outputs)
        chosen = positive[n].nonzero().squeeze(1)
        channels = torch.full((8732,), CLASSES)
        channels[chosen] = label[n, chosen]
        entropy = F.cross_entropy(logits, channels, reduction="none")
        negatives = entropy[~positive[n]].sort(descending=True).values[: 3 * len(chosen)]
        class_loss = class_loss + entropy[chosen].sum() + negatives.sum()
        target = encode(boxes[n, matched[n, chosen]], CRITERION.anchors[chosen], RECIPE).double()
        box_loss = box_loss + F.smooth_l1_loss(offsets[chosen], target, reduction="sum")
        count += max(len(chosen), 1)
    losses = {"loss_cls": class_loss / count, "loss_bbox": box_loss / count}
    return losses | {"loss": losses["loss_cls"] + losses["loss_bbox"]}


def gradients(loss, outputs):
    return torch.autograd.grad(loss, outputs)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 3))
def test_loss_and_gradient_are_the_formula(seed, images):
    outputs, truth = batch(seed, images)
    truth[2][:, 0] = True
    found, expected = CRITERION(outputs, *truth), by_formula(outputs, *truth)
    assert found.keys() == expected.keys()
    for name in found:
        assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    pairs = zip(
        gradients(found["loss"], outputs), gradients(expected["loss"], outputs), strict=True
    )
    for own, reference in pairs:
        assert reference.abs().max() > 1e-5
        assert_close(own, reference, rtol=1e-4, atol=1e-7)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), garbage=st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_what_lies_in_padding_does_not_matter(seed, garbage):
    outputs, (boxes, labels, valid) = batch(seed, 2)
    clean = CRITERION(outputs, boxes, labels, valid)["loss"]
    boxes = torch.where(valid.unsqueeze(-1), boxes, garbage)
    labels = torch.where(valid, labels, 10**9)
    dirty = CRITERION(outputs, boxes, labels, valid)["loss"]
    assert torch.equal(clean, dirty)
    for a, b in zip(gradients(clean, outputs), gradients(dirty, outputs), strict=True):
        assert torch.equal(a, b)


def test_images_without_boxes_cost_nothing_but_add_one_to_the_normaliser():
    outputs, truth = batch(0, 2, boxes=0)
    losses = CRITERION(outputs, *truth)
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    for gradient in gradients(losses["loss"], outputs):
        assert gradient.eq(0).all()

    outputs, (boxes, labels, valid) = batch(1, 2, boxes=3)
    alone = CRITERION([x[:1] for x in outputs], boxes[:1], labels[:1], valid[:1])["loss"]
    valid[1] = False
    count = CRITERION.targets(boxes, labels, valid)[0].sum()
    expected = alone * count / (count + 1)
    assert_close(CRITERION(outputs, boxes, labels, valid)["loss"], expected)


def test_with_too_few_negatives_none_counts_twice():
    # Every anchor overlaps a box as large as the image, so with limit 0 all are positive.
    criterion = DetectionLoss(replace(RECIPE, match_iou=0.0), CLASSES)
    outputs, (boxes, labels, valid) = batch(0, 1, boxes=1)
    boxes[0, 0] = torch.tensor([-300.0, -300, 600, 600])
    assert criterion.targets(boxes, labels, valid)[0].all()
    entropy = F.cross_entropy(outputs[1][0], labels[0, :1].expand(8732), reduction="mean")
    assert_close(criterion(outputs, boxes, labels, valid)["loss_cls"], entropy)


def test_a_vanishing_box_has_a_finite_loss():
    outputs, (boxes, labels, valid) = batch(0, 1, boxes=1)
    boxes[0, 0] = torch.tensor([80.0, 80, 80, 80 + 1e-5])
    losses = CRITERION(outputs, boxes, labels, valid)
    assert losses["loss"].isfinite()
    assert all(g.isfinite().all() for g in gradients(losses["loss"], outputs))


def test_half_precision_outputs_are_computed_in_fp32():
    outputs, truth = batch(3, 2)
    halves = [output.detach().bfloat16().requires_grad_() for output in outputs]
    losses = CRITERION(halves, *truth)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert torch.equal(losses["loss"], CRITERION([h.float() for h in halves], *truth)["loss"])
    assert {g.dtype for g in gradients(losses["loss"], halves)} == {torch.bfloat16}
