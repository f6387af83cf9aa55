from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ssd_resnet34 import loss as module
from ssd_resnet34.anchors import encode, to_cxcywh
from ssd_resnet34.config import RECIPES
from ssd_resnet34.loss import DetectionLoss
from ssd_resnet34.targets import assign

RECIPE = RECIPES["1p"]
CLASSES = 4
MAX_BOXES = 8
CRITERION = DetectionLoss(RECIPE, CLASSES)


def batch(seed, images, boxes=None):
    """Outputs that want gradients, and ground truth with some rows left empty."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(images, 4, 8732, generator=generator).requires_grad_()
    logits = (3 * torch.randn(images, 1 + CLASSES, 8732, generator=generator)).requires_grad_()
    corner = 0.6 * torch.rand(images, MAX_BOXES, 2, generator=generator)
    size = 0.05 + 0.35 * torch.rand(images, MAX_BOXES, 2, generator=generator)
    labels = torch.randint(0, CLASSES, (images, MAX_BOXES), generator=generator)
    valid = torch.rand(images, MAX_BOXES, generator=generator) < 0.6
    if boxes is not None:
        valid = torch.arange(MAX_BOXES).expand(images, MAX_BOXES) < boxes
    return (deltas, logits), (torch.cat([corner, corner + size], dim=2), labels, valid)


def by_formula(outputs, boxes, labels, valid):
    """The loss in the words of the paper, image by image, in float64."""
    parts = {"loss_cls": [], "loss_bbox": []}
    positive, matched, label = assign(CRITERION.anchors_xyxy, boxes, labels, valid, 0.5)
    for n in range(len(boxes)):
        deltas, logits = (output[n].double() for output in outputs)
        chosen = positive[n].nonzero().squeeze(1)
        channels = torch.zeros(8732, dtype=torch.int64)
        channels[chosen] = label[n, chosen] + 1
        entropy = F.cross_entropy(logits.T, channels, reduction="none")
        negatives = entropy[~positive[n]].sort(descending=True).values[: 3 * len(chosen)]
        anchors = CRITERION.anchors[chosen]
        target = encode(to_cxcywh(boxes[n])[matched[n, chosen]], anchors, RECIPE).double()
        box_loss = F.smooth_l1_loss(deltas[:, chosen].T, target, reduction="sum")
        share = 1 / max(len(chosen), 1)
        parts["loss_cls"].append((entropy[chosen].sum() + negatives.sum()) * share)
        parts["loss_bbox"].append(box_loss * share)
    losses = {name: torch.stack(values).mean() for name, values in parts.items()}
    return losses | {"loss": losses["loss_cls"] + losses["loss_bbox"]}


def gradients(loss, outputs):
    return torch.autograd.grad(loss, outputs)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 3))
def test_loss_and_gradient_are_the_formula(seed, images):
    outputs, truth = batch(seed, images)
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
@given(seed=st.integers(0, 10**6), images=st.integers(2, 4))
def test_a_batch_is_the_mean_of_its_images(seed, images):
    outputs, truth = batch(seed, images)
    with torch.no_grad():
        together = CRITERION(outputs, *truth)
        alone = [
            CRITERION([x[n : n + 1] for x in outputs], *(x[n : n + 1] for x in truth))
            for n in range(images)
        ]
    for name, value in together.items():
        assert_close(value, torch.stack([one[name] for one in alone]).mean())


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


def test_images_without_boxes_cost_nothing_but_count():
    outputs, truth = batch(0, 2, boxes=0)
    losses = CRITERION(outputs, *truth)
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    for gradient in gradients(losses["loss"], outputs):
        assert gradient.eq(0).all()

    outputs, (boxes, labels, valid) = batch(1, 2, boxes=3)
    full = CRITERION([x[:1] for x in outputs], boxes[:1], labels[:1], valid[:1])["loss"]
    valid[1] = False
    assert_close(CRITERION(outputs, boxes, labels, valid)["loss"], full / 2)


def test_with_too_few_negatives_none_counts_twice():
    # Every anchor overlaps a box as large as the image, so with limit 0 all are positive.
    criterion = DetectionLoss(replace(RECIPE, match_iou=0.0), CLASSES)
    outputs, (boxes, labels, valid) = batch(0, 1, boxes=1)
    boxes[0, 0] = torch.tensor([-1.0, -1, 2, 2])
    assert criterion.targets(boxes, labels, valid)[0].all()
    entropy = F.cross_entropy(outputs[1], (labels[:, :1] + 1).expand(1, 8732), reduction="mean")
    assert_close(criterion(outputs, boxes, labels, valid)["loss_cls"], entropy)


def test_a_vanishing_box_has_a_finite_loss():
    outputs, (boxes, labels, valid) = batch(0, 1, boxes=1)
    boxes[0, 0] = torch.tensor([0.25, 0.25, 0.25, 0.25 + 1e-9])
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


def test_a_batch_at_once_is_one_image_at_a_time(monkeypatch):
    outputs, truth = batch(5, 3)
    one = CRITERION(outputs, *truth)["loss"]
    monkeypatch.setattr(module, "chunk_size", len)  # as on an accelerator
    once = CRITERION(outputs, *truth)["loss"]
    assert_close(once, one)
    for a, b in zip(gradients(one, outputs), gradients(once, outputs), strict=True):
        assert_close(a, b)
