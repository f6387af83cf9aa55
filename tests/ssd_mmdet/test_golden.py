"""Every golden file of ssd_mmdet about the network, within the tolerances of its README."""

import copy

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from common.npu.precision import build_sgd
from ssd_mmdet import postprocess
from ssd_mmdet.anchors import decode, make_anchors
from ssd_mmdet.config import RECIPES
from ssd_mmdet.loss import DetectionLoss
from ssd_mmdet.model import build_model
from ssd_mmdet.postprocess import detect
from ssd_mmdet.targets import assign
from tests.golden.fill import probe
from tests.ssd_mmdet.conftest import filled_value

SIZE = torch.tensor([[427, 640]])  # height, width of the image in detect.npz


def check_probe(golden, name, array, atol, rtol=1e-5):
    array = array.detach().numpy()
    found = probe(array, count=len(golden[f"{name}.index"]))
    assert_array_equal(found["index"], golden[f"{name}.index"])
    assert_array_equal(found["shape"], golden[f"{name}.shape"])
    assert_allclose(found["value"], golden[f"{name}.value"], rtol=0, atol=atol)
    assert_allclose(found["l1"], golden[f"{name}.l1"], rtol=rtol)
    assert_allclose(found["l2"], golden[f"{name}.l2"], rtol=rtol)


@pytest.mark.parametrize(("name", "file"), [("1p", "keys.json"), ("ssd512", "ssd512_keys.json")])
def test_keys(golden, name, file):
    with torch.device("meta"):
        state = build_model(RECIPES[name], 80).state_dict()
    assert [[key, list(value.shape)] for key, value in state.items()] == golden(file)


@pytest.mark.parametrize(
    ("name", "file"), [("1p", "anchors.npz"), ("ssd512", "ssd512_anchors.npz")]
)
def test_anchors(golden, name, file):
    recipe, expected = RECIPES[name], golden(file)
    anchors = make_anchors(recipe)
    assert anchors.dtype == torch.float32
    assert_allclose(anchors.numpy(), expected["anchors"], rtol=0, atol=1e-4)
    cells = np.square(recipe.anchor_maps)
    shapes = [2 + 2 * len(ratios) for ratios in recipe.anchor_ratios]
    assert_array_equal(cells * shapes, expected["per_level"])
    starts = np.cumsum(expected["per_level"]) - expected["per_level"]
    first = [start + np.arange(count) for start, count in zip(starts, shapes, strict=True)]
    assert_allclose(anchors[np.concatenate(first)], expected["base"], rtol=0, atol=1e-4)


# Values of up to 40, summed in fp32 in the order of the processor's kernels: without AVX-512 one of
# 1,024 values is 2.1e-4 off the golden one, 5 parts in a million.
FORWARD_ATOL = 3e-4


def test_forward(golden, filled_model):
    draws = np.random.default_rng(0).uniform(-120, 150, (2, 3, 300, 300))
    with torch.no_grad():
        levels = filled_model.backbone(torch.from_numpy(draws.astype(np.float32)))
        offsets, logits = filled_model.bbox_head(levels)
    for position, level in enumerate(levels):
        check_probe(golden("forward.npz"), f"feat{position}", level, atol=FORWARD_ATOL)
    check_probe(golden("forward.npz"), "cls", logits, atol=FORWARD_ATOL)
    check_probe(golden("forward.npz"), "reg", offsets, atol=FORWARD_ATOL)


def test_forward_of_ssd512(golden):
    with torch.device("meta"):
        model = build_model(RECIPES["ssd512"], 80)
    state = {key: filled_value(key, shape) for key, shape in golden("ssd512_keys.json")}
    model.load_state_dict(state, assign=True)
    draws = np.random.default_rng(7).uniform(-120, 150, (1, 3, 512, 512))
    with torch.no_grad():
        offsets, logits = model.eval()(torch.from_numpy(draws.astype(np.float32)))
    check_probe(golden("ssd512_forward.npz"), "cls", logits, atol=2e-4)
    check_probe(golden("ssd512_forward.npz"), "reg", offsets, atol=2e-4)


def test_training_input_without_augmentation(golden, real):
    check_probe(golden("targets.npz"), "input", real.inputs, atol=1e-3)


@pytest.mark.parametrize("i", [0, 1])
def test_targets(golden, recipe, real, i):
    expected = {name: golden("targets.npz")[f"pos_{name}{i}"] for name in ("index", "gt", "label")}
    truth = [part[i : i + 1] for part in real.truth]
    criterion = DetectionLoss(recipe, 80)
    positive, target, channel = criterion.targets(*truth)
    index = positive[0].nonzero().squeeze(1)
    assert_array_equal(index, expected["index"])
    assert_array_equal(channel[0, index], expected["label"])
    assert channel[~positive].eq(80).all()
    assert positive.logical_not().sum() == golden("targets.npz")[f"num_neg{i}"]
    assert_allclose(target[0, index], golden("targets.npz")[f"pos_target{i}"], rtol=0, atol=1e-4)

    positive, matched, label = assign(criterion.anchors, *truth, 0.5)
    assert_array_equal(positive[0].nonzero().squeeze(1), index)
    assert_array_equal(label[0, index], expected["label"])
    assert_array_equal(matched[0, index], expected["gt"])


def random_outputs(seed, images):
    draws = np.random.default_rng(seed)
    logits = draws.standard_normal((images, 8732, 81))
    offsets = 0.5 * draws.standard_normal((images, 8732, 4))
    return [torch.from_numpy(x.astype(np.float32)).requires_grad_() for x in (offsets, logits)]


@pytest.mark.parametrize(("case", "seed", "images"), [("a", 1, 2), ("b", 2, 3)])
def test_loss_and_gradients(golden, recipe, real, case, seed, images):
    expected = golden("loss.npz")
    outputs = random_outputs(seed, images)
    truth = [part[:images] for part in real.truth]
    criterion = DetectionLoss(recipe, 80)
    losses = criterion(outputs, *truth)
    losses["loss"].backward()
    assert_allclose(losses["loss_cls"].item(), expected[f"{case}_cls"].sum(), rtol=1e-5)
    assert_allclose(losses["loss_bbox"].item(), expected[f"{case}_reg"].sum(), rtol=1e-5)
    assert_allclose(losses["loss"].item(), expected[f"{case}_total"], rtol=1e-5)
    used = (outputs[1].grad != 0).any(dim=2).flatten().nonzero().squeeze(1)
    assert_array_equal(used, expected[f"{case}_used"])
    check_probe(expected, f"{case}_grad_cls", outputs[1].grad, atol=1e-7)
    check_probe(expected, f"{case}_grad_reg", outputs[0].grad, atol=1e-7)

    # The golden has a value an image, with the normaliser of the whole batch.
    counts = criterion.targets(*truth)[0].sum(dim=1).clamp(min=1)
    for i in range(images):
        one = slice(i, i + 1)
        alone = criterion([x[one] for x in outputs], *(x[one] for x in truth))
        share = (counts[i] / counts.sum()).item()
        found = [alone[name].item() * share for name in ("loss_cls", "loss_bbox")]
        values = expected[f"{case}_cls"][i], expected[f"{case}_reg"][i]
        assert_allclose(found, values, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    # With a decay that shows in five steps, and with the recipe's.
    ["train_decay.npz", pytest.param("train.npz", marks=pytest.mark.again)],
)
def test_five_training_steps(golden, recipe, filled_model, real, file):
    expected = golden(file)
    rates = {name: float(expected[name]) for name in ("lr", "momentum", "weight_decay")}
    model = copy.deepcopy(filled_model).train()
    criterion = DetectionLoss(recipe, 80)
    optimizer = build_sgd(list(model.parameters()), torch.device("cpu"), **rates)
    found = []
    for _ in range(5):
        optimizer.zero_grad(set_to_none=True)
        losses = criterion(model(real.inputs), *(part[:2] for part in real.truth))
        losses["loss"].backward()
        optimizer.step()
        found.append([losses[name].item() for name in ("loss_cls", "loss_bbox", "loss")])
    assert_allclose(found[:2], expected["losses"][:2], rtol=1e-6)
    assert_allclose(found[2:], expected["losses"][2:], rtol=3e-4)
    before, after = filled_model.state_dict(), model.state_dict()
    norms = [after[key].double().norm().item() for key in expected["keys"]]
    assert_allclose(norms, expected["norms"], rtol=1e-4)
    moved = np.array([(after[k] - before[k]).double().norm().item() for k in expected["keys"]])
    visible = expected["moved"] >= 1e-6
    assert visible.sum() >= 9
    assert_allclose(moved[visible], expected["moved"][visible], rtol=5e-3)


def detection_outputs(case):
    draws = np.random.default_rng({"sparse": 3, "dense": 4}[case])
    logits = draws.standard_normal((1, 8732, 81)).astype(np.float32)
    if case == "sparse":
        logits[..., 80] += 8
        hot = draws.choice(8700, 60, replace=False)
        labels = draws.integers(0, 80, 60)
        values = draws.uniform(6, 12, 60).astype(np.float32)
        for place, label, value in zip(hot, labels, values, strict=True):
            logits[0, place : place + 6, label] += value
    offsets = draws.standard_normal((1, 8732, 4)).astype(np.float32)
    offsets[0, :50, 2:] *= 30
    return torch.from_numpy(offsets), torch.from_numpy(logits)


def assert_same_detections(found, boxes, scores, labels, box_atol, score_atol=1e-6):
    """Rows whose scores differ by less than 1e-6 may swap: compare groups of those as sets."""
    assert_allclose(found.scores, scores, rtol=0, atol=score_atol)
    group = np.cumsum(np.diff(scores, prepend=scores[0]) < -1e-6)
    own = np.lexsort((found.boxes[:, 0], found.labels, group))
    theirs = np.lexsort((boxes[:, 0], labels, group))
    assert_array_equal(found.labels.numpy()[own], labels[theirs])
    assert_allclose(found.boxes.numpy()[own], boxes[theirs], rtol=0, atol=box_atol)


@pytest.mark.parametrize("case", ["sparse", "dense"])
def test_detections(golden, recipe, case):
    expected, outputs = golden("detect.npz"), detection_outputs(case)
    decoded = decode(outputs[0], make_anchors(recipe), recipe)[0]
    scale = torch.tensor([640, 427, 640, 427]) / 300
    check_probe(expected, f"{case}_decoded", decoded * scale, atol=1e-2)
    above = (outputs[1].softmax(dim=2)[..., :80] > recipe.score_threshold).sum()
    assert above == expected[f"{case}_candidates"]
    (found,) = detect(outputs, SIZE, recipe)
    boxes, scores, labels = (expected[f"{case}_{part}"] for part in ("boxes", "scores", "labels"))
    assert_same_detections(found, boxes, scores, labels, box_atol=1e-2)


@pytest.mark.parametrize("case", ["sparse", "dense"])
def test_detections_the_way_of_an_accelerator(golden, recipe, monkeypatch, case):
    monkeypatch.setattr(postprocess, "in_host_memory", lambda device: False)
    test_detections(golden, recipe, case)


@pytest.mark.parametrize("case", ["1p", "8p"])
def test_learning_rate(golden, case):
    expected = golden("lr.json")[case]
    recipe, world = RECIPES[case], int(case[0])
    assert recipe.base_lr(world, recipe.batch_size) == pytest.approx(expected["base_lr"], rel=1e-12)
    assert recipe.epochs == expected["epochs"]
    iterations, rates = zip(*expected["lr"], strict=True)
    place = expected["iterations_per_epoch"], world, recipe.batch_size
    found = [recipe.lr_at(iteration, *place) for iteration in iterations]
    assert found == pytest.approx(rates, rel=1e-9, abs=0)
