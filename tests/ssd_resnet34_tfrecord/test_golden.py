"""The golden files of network, matching, loss, schedule and detections, within their tolerances."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from common.coco.evaluation import to_result_rows
from common.npu.precision import build_sgd
from ssd_resnet34.tfrecord.anchors import make_anchors, make_anchors_cxcywh
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.loss import DetectionLoss, decay_term
from ssd_resnet34.tfrecord.model import build_model
from ssd_resnet34.tfrecord.postprocess import decode_outputs, detect
from ssd_resnet34.tfrecord.weights import tensorflow_names
from tests.golden.fill import probe

YXYX = [1, 0, 3, 2]  # (ymin, xmin, ymax, xmax) to (left, top, right, bottom) and back
# Our place of what the golden forward pass names.
MAPS = {
    "nhwc_initial_conv": "model.0",
    "nhwc_initial_max_pool": "model.2.1",
    "nhwc_block_group1": "model.3",
    "nhwc_block_group2": "model.4",
    "nhwc_block_group3": "model.5",
    **{f"nhwc_block{7 + k}-conv3x3": f"additional_blocks.{k}" for k in range(5)},
}


def check_probe(golden, name, array, atol, rtol=1e-5):
    array = array.detach().numpy()
    found = probe(array, count=len(golden[f"{name}/index"]))
    assert_array_equal(found["index"], golden[f"{name}/index"])
    assert_array_equal(found["shape"], golden[f"{name}/shape"])
    assert_allclose(found["value"], golden[f"{name}/value"], rtol=0, atol=atol)
    assert_allclose(found["l1"], golden[f"{name}/l1"], rtol=rtol)
    assert_allclose(found["l2"], golden[f"{name}/l2"], rtol=rtol)


def normalised(images, recipe):
    images = (images - np.float32(recipe.mean)) / np.float32(recipe.std)
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def truth(golden):
    """The three golden target sets, padded: boxes (3, 16, 4), labels (3, 16), valid (3, 16)."""
    boxes, labels = torch.zeros(3, 16, 4), torch.zeros(3, 16, dtype=torch.int64)
    valid = torch.zeros(3, 16, dtype=torch.bool)
    for i in range(3):
        given = golden("targets")[f"gt_boxes_{i}"][:, YXYX]
        boxes[i, : len(given)] = torch.from_numpy(given)
        labels[i, : len(given)] = torch.from_numpy(golden("targets")[f"gt_labels_{i}"]).long() - 1
        valid[i, : len(given)] = True
    return boxes, labels, valid


def test_keys_and_shapes(golden, recipe):
    model = build_model(recipe, 80)
    state, names = model.state_dict(), tensorflow_names(model)
    shapes = {}
    for key, name in names.items():
        shape = list(state[key].shape)
        shapes[name] = [shape[2], shape[3], shape[1], shape[0]] if len(shape) == 4 else shape
    expected = {name.removeprefix("resnet34/"): shape for name, shape in golden("keys")}
    assert shapes == expected
    assert len(list(model.parameters())) == 131
    assert sum(state[key].numel() for key in names) == 19_982_390


def test_anchors(golden, recipe):
    boxes = make_anchors_cxcywh(recipe)[:, YXYX]
    assert_allclose(boxes, golden("anchors")["cy_cx_h_w"], rtol=0, atol=1e-7)
    corners = make_anchors(recipe)[:, YXYX]
    assert_array_equal(corners, golden("anchors")["ymin_xmin_ymax_xmax"])


@pytest.mark.parametrize(
    "case", ["rank_size_8_batch_32", "rank_size_1_batch_32", "rank_size_4_batch_16"]
)
def test_learning_rate(golden, case):
    expected = golden("lr")[case]
    recipe = Recipe(batch_size=expected["batch_size"])
    world_size = expected["rank_size"]
    per_epoch = recipe.iters_per_epoch(world_size)
    assert int(recipe.lr_warmup_epochs * per_epoch) == expected["warmup_steps"]
    assert int(recipe.lr_cosine_epochs * per_epoch) == expected["cosine_decay_steps"]
    assert recipe.total_steps(world_size) == expected["total_steps"]
    steps, rates = zip(*expected["table"], strict=True)
    place = per_epoch, world_size, recipe.batch_size
    assert [recipe.lr_at(step, *place) for step in steps] == pytest.approx(rates, rel=2e-6, abs=0)


def test_learning_rate_in_the_seeds_log():
    recipe = Recipe()
    assert str(np.float32(recipe.lr_at(3099, recipe.iters_per_epoch(8), 8, 32))) == "0.02377195"


def test_forward(golden, recipe, filled_model):
    images = normalised(
        np.random.default_rng(2).random((2, 300, 300, 3)).astype(np.float32), recipe
    )
    seen = {}

    def keep(name):
        return lambda _module, _inputs, output: seen.__setitem__(name, output.clone())

    for name, place in MAPS.items():
        filled_model.get_submodule(place).register_forward_hook(keep(name))
    with torch.no_grad():
        codes, logits = filled_model(images)
    for name in MAPS:
        check_probe(golden("forward"), name, seen[name].permute(0, 2, 3, 1), atol=2e-4)
    check_probe(golden("forward"), "box_codes", codes.transpose(1, 2), atol=2e-4)
    check_probe(golden("forward"), "class_logits", logits.transpose(1, 2), atol=2e-4)


def test_targets(golden, recipe, truth):
    positive, code, channel = DetectionLoss(recipe, 80).targets(*truth)
    for i in range(3):
        expected = {
            name: golden("targets")[f"{name}_{i}"]
            for name in ("positive_index", "positive_label", "positive_code_ty_tx_th_tw")
        }
        index = positive[i].nonzero().squeeze(1)
        assert_array_equal(index, expected["positive_index"])
        assert len(index) == golden("targets")[f"num_matched_{i}"]
        assert_array_equal(channel[i, index], expected["positive_label"])
        found = code[i, :, index].T
        assert_allclose(found, expected["positive_code_ty_tx_th_tw"], rtol=0, atol=5e-6)
    assert code.transpose(1, 2)[~positive].eq(0).all()
    assert channel[~positive].eq(0).all()


@pytest.mark.parametrize(("variant", "extra"), [("port", 1), ("mlperf", 0)])
def test_loss_and_gradients(golden, recipe, truth, variant, extra):
    draws = np.random.default_rng(1)
    logits = draws.standard_normal((3, 8732, 81)).astype(np.float32)
    codes = draws.standard_normal((3, 8732, 4)).astype(np.float32)
    logits, codes = (torch.from_numpy(x).requires_grad_() for x in (logits, codes))
    criterion = DetectionLoss(dataclasses.replace(recipe, extra_negatives=extra), 80)
    losses = criterion((codes.transpose(1, 2), logits.transpose(1, 2)), *truth)
    losses["loss"].backward()
    expected = golden("loss")
    for name, part in (("total", "loss"), ("class", "loss_cls"), ("box", "loss_bbox")):
        assert_allclose(losses[part].item(), expected[f"{variant}_{name}"], rtol=1e-5)
    for name, value in (("class", logits), ("box", codes)):
        largest = value.grad.abs().max().item()
        check_probe(expected, f"{variant}_grad_{name}", value.grad, atol=1e-6 * largest)
    rows = (logits.grad != 0).any(dim=2).sum(dim=1)
    assert_array_equal(rows, expected[f"{variant}_nonzero_class_rows"])


@pytest.mark.slow
def test_six_training_steps(golden, filled_model, truth):
    recipe = Recipe(batch_size=2, num_examples_per_epoch=20, lr=0.016, extra_negatives=1)
    images = np.random.default_rng(5).random((2, 300, 300, 3)).astype(np.float32)
    images = normalised(images, recipe)
    model, criterion = filled_model.train(), DetectionLoss(recipe, 80)
    names = {name: key for key, name in tensorflow_names(model).items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    rates = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = build_sgd(parameters, torch.device("cpu"), lr=0.0, **rates)
    for step, rate, total, class_loss, box_loss in golden("train")["rows_step_lr_total_class_box"]:
        lr = recipe.lr_at(int(step), recipe.iters_per_epoch(1), 1, 2)
        assert lr == pytest.approx(rate, rel=2e-6)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        losses = criterion(model(images), *(part[:2] for part in truth))
        decay = decay_term(parameters, recipe.weight_decay).item()
        losses["loss"].backward()
        optimizer.step()
        assert_allclose(losses["loss"].item() + decay, total, rtol=1e-4)
        assert_allclose(losses["loss_cls"].item(), class_loss, rtol=1e-4)
        assert_allclose(losses["loss_bbox"].item(), box_loss, rtol=1e-4)
    after = model.state_dict()
    keys = [names[name.removeprefix("resnet34/")] for name in golden("train")["names"]]
    norms = [after[key].double().norm().item() for key in keys]
    assert_allclose(norms, golden("train")["l2_after"], rtol=1e-5)
    sums = np.array([after[key].double().sum().item() for key in keys])
    # Sums of values of both signs: their error is that of the norm.
    counts = np.array([after[key].numel() for key in keys])
    assert (
        np.abs(sums - golden("train")["sum_after"]) <= 1e-5 * np.array(norms) * np.sqrt(counts)
    ).all()
    changes = [(after[key].double() - before[key].double()).norm().item() for key in keys]
    assert_allclose(changes, golden("train")["l2_of_change"], rtol=5e-3)


@pytest.fixture(scope="module")
def raw_outputs():
    draws = np.random.default_rng(3)
    logits = (1.5 * draws.standard_normal((2, 8732, 81))).astype(np.float32)
    logits[..., 0] += np.float32(6)
    codes = draws.standard_normal((2, 8732, 4)).astype(np.float32)
    return tuple(torch.from_numpy(x).transpose(1, 2) for x in (codes, logits))


def test_decoded_boxes_and_best_scores(golden, recipe, raw_outputs):
    boxes, scores = decode_outputs(raw_outputs, make_anchors(recipe), recipe)
    check_probe(golden("detect"), "decoded_boxes", boxes[..., YXYX], atol=1e-6)
    background = raw_outputs[1].softmax(dim=1)[:, :1]
    best = torch.cat([background, scores], dim=1).topk(200, dim=2).values
    check_probe(golden("detect"), "topk_scores", best.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(("variant", "clamp"), [("port", True), ("mlperf", False)])
def test_detections(golden, recipe, raw_outputs, variant, clamp):
    recipe = dataclasses.replace(recipe, clamp_boxes=clamp)
    for i, found in enumerate(detect(raw_outputs, torch.ones(2, 2, dtype=torch.int64), recipe)):
        boxes, labels, scores = (
            golden("detect")[f"{variant}_{name}_{i}"][::-1]  # best first
            for name in ("boxes_ymin_xmin_ymax_xmax", "label", "score")
        )
        assert_array_equal(found.labels + 1, labels)
        assert_allclose(found.scores, scores, rtol=0, atol=1e-6)
        assert_allclose(found.boxes[:, YXYX], boxes, rtol=0, atol=1e-6)


def test_coco_rows(golden, recipe, raw_outputs):
    sizes = torch.from_numpy(golden("detect")["raw_shape_h_w_c"][:, :2].astype(np.int64))
    for i, found in enumerate(detect(raw_outputs, sizes, recipe)):
        image_id = int(golden("detect")["source_id"][i])
        rows = to_result_rows(image_id, *(part.numpy() for part in found), recipe.category_ids)
        expected = golden("detect")[f"port_coco_rows_{i}"][::-1]  # best first
        assert_array_equal(rows[:, [0, 6]], expected[:, [0, 6]])
        assert_allclose(rows[:, 1:5], expected[:, 1:5], rtol=0, atol=2e-6 * sizes.max().item())
        assert_allclose(rows[:, 5], expected[:, 5], rtol=0, atol=1e-6)
