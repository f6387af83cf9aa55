from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from m2det.anchors import encode, to_cxcywh
from m2det.config import RECIPES
from m2det.loss import DetectionLoss
from m2det.targets import assign

RECIPE = RECIPES["320_vgg"]
CLASSES = 4
MAX_BOXES = 16
ANCHORS = 12810
CRITERION = DetectionLoss(RECIPE, CLASSES)


def batch(seed, images, boxes=None):
    """Outputs that want gradients, and ground truth with some rows left empty."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(images, ANCHORS, 4, generator=generator).requires_grad_()
    logits = (3 * torch.randn(images, ANCHORS, 1 + CLASSES, generator=generator)).requires_grad_()
    corner = 0.6 * torch.rand(images, MAX_BOXES, 2, generator=generator)
    size = 0.05 + 0.35 * torch.rand(images, MAX_BOXES, 2, generator=generator)
    labels = torch.randint(0, CLASSES, (images, MAX_BOXES), generator=generator)
    valid = torch.rand(images, MAX_BOXES, generator=generator) < 0.6
    if boxes is not None:
        valid = torch.arange(MAX_BOXES).expand(images, MAX_BOXES) < boxes
    return (deltas, logits), (torch.cat([corner, corner + size], dim=2), labels, valid)


def by_formula(outputs, boxes, labels, valid):
    """The loss in words: sums over images in float64, divided by the number of positives."""
    losses, positives = {"loss_cls": 0.0, "loss_bbox": 0.0}, 0
    positive, matched, label = assign(CRITERION.anchors_xyxy, boxes, labels, valid, 0.5)
    for n in range(len(boxes)):
        deltas, logits = (output[n].double() for output in outputs)
        chosen = positive[n].nonzero().squeeze(1)
        channels = torch.zeros(ANCHORS, dtype=torch.int64)
        channels[chosen] = label[n, chosen] + 1
        entropy = F.cross_entropy(logits, channels, reduction="none")
        negatives = entropy[~positive[n]].sort(descending=True).values[: 3 * len(chosen)]
        anchors = CRITERION.anchors[chosen]
        target = encode(to_cxcywh(boxes[n])[matched[n, chosen]], anchors, RECIPE).double()
        losses["loss_bbox"] += F.smooth_l1_loss(deltas[chosen], target, reduction="sum")
        losses["loss_cls"] += entropy[chosen].sum() + negatives.sum()
        positives += len(chosen)
    losses = {name: value / max(positives, 1) for name, value in losses.items()}
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


def test_images_without_boxes_cost_nothing():
    outputs, truth = batch(0, 2, boxes=0)
    losses = CRITERION(outputs, *truth)
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    for gradient in gradients(losses["loss"], outputs):
        assert gradient.eq(0).all()

    outputs, (boxes, labels, valid) = batch(1, 2, boxes=3)
    full = CRITERION([x[:1] for x in outputs], boxes[:1], labels[:1], valid[:1])["loss"]
    valid[1] = False
    assert_close(CRITERION(outputs, boxes, labels, valid)["loss"], full)


def test_with_too_few_negatives_none_counts_twice():
    # Every anchor overlaps a box as large as the image, so with limit 0 all are positive.
    criterion = DetectionLoss(replace(RECIPE, match_iou=0.0), CLASSES)
    outputs, (boxes, labels, valid) = batch(0, 1, boxes=1)
    boxes[0, 0] = torch.tensor([-1.0, -1, 2, 2])
    assert criterion.targets(boxes, labels, valid)[0].all()
    channels = (labels[0, 0] + 1).expand(ANCHORS)
    entropy = F.cross_entropy(outputs[1][0], channels, reduction="mean")
    assert_close(criterion(outputs, boxes, labels, valid)["loss_cls"], entropy)


def test_a_vanishing_box_has_a_finite_loss():
    outputs, (boxes, labels, valid) = batch(0, 1, boxes=1)
    boxes[0, 0] = torch.tensor([0.25, 0.25, 0.25, 0.25 + 1e-9])
    losses = CRITERION(outputs, boxes, labels, valid)
    assert losses["loss"].isfinite()
    assert all(g.isfinite().all() for g in gradients(losses["loss"], outputs))


def test_logits_far_apart_between_images_are_mined_alike():
    # The original subtracts one maximum of the whole batch and loses rows far below it.
    outputs, truth = batch(2, 2, boxes=4)
    lifted = outputs[1].detach().clone()
    lifted[0] += 1000
    assert_close(
        CRITERION((outputs[0], lifted), *truth)["loss"], CRITERION(outputs, *truth)["loss"],
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_half_precision_outputs_are_computed_in_fp32():
    outputs, truth = batch(3, 2)
    halves = [output.detach().bfloat16().requires_grad_() for output in outputs]
    losses = CRITERION(halves, *truth)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert torch.equal(losses["loss"], CRITERION([h.float() for h in halves], *truth)["loss"])
    assert {g.dtype for g in gradients(losses["loss"], halves)} == {torch.bfloat16}


def allocated(outputs, truth):
    """Bytes of every tensor that a forward and backward pass makes, one number an operation."""
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(made)
            sizes.extend(x.nbytes for x in leaves if isinstance(x, torch.Tensor))
            return made

    with Sizes():
        gradients(CRITERION(outputs, *truth)["loss"], outputs)
    return sizes


def test_memory_does_not_depend_on_the_number_of_positives():
    few, many = (allocated(*batch(7, 2, boxes=boxes)) for boxes in (1, MAX_BOXES))
    assert len(few) > 50
    assert few == many
    assert max(few) <= 2 * ANCHORS * max(MAX_BOXES * 4, 8 * (1 + CLASSES))
