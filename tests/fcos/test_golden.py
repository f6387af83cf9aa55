"""Every golden file of fcos, within the tolerances of its README."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from common.coco.images import read_image
from common.npu.precision import Precision, build_sgd
from fcos.anchors import make_anchors, map_sizes
from fcos.config import RECIPES
from fcos.data import TrainingSet, normalise, prepare_image, resized_size, scale_boxes
from fcos.loss import BACKGROUND, DetectionLoss, centerness_of
from fcos.model import Outputs, build_model, param_groups
from fcos.postprocess import detect, detect_resized
from tests.golden.fill import probe

SMALL = (256, 320)
SIZES = {name: map_sizes(RECIPES["gn"], *size) for name, size in {
    "256x320": SMALL, "800x1344": (800, 1344), "1344x1344": (1344, 1344)
}.items()}  # fmt: skip
RECIPE_OF = {"base": "gn", "one_empty": "gn", "empty": "gn", "many": "gn", "tricks": "tricks"}


def check_probe(golden, name, array, atol, rtol=1e-5):
    array = array.detach().numpy()
    found = probe(array, count=len(golden[f"{name}.index"]))
    assert_array_equal(found["index"], golden[f"{name}.index"])
    assert_array_equal(found["shape"], golden[f"{name}.shape"])
    assert_allclose(found["value"], golden[f"{name}.value"], rtol=0, atol=atol)
    assert_allclose(found["l1"], golden[f"{name}.l1"], rtol=rtol)
    assert_allclose(found["l2"], golden[f"{name}.l2"], rtol=rtol)


@pytest.mark.parametrize("name", ["gn", "nogn", "tricks"])
def test_keys(golden, name):
    state = build_model(RECIPES[name], 80).state_dict()
    expected = golden("keys" if name == "gn" else f"keys_{name}")
    assert [[key, list(value.shape)] for key, value in state.items()] == expected


@pytest.mark.parametrize("name", SIZES)
def test_anchors(golden, recipe, name):
    expected = [golden("anchors")[f"{name}.level{level}"] for level in range(5)]
    points = make_anchors(recipe, SIZES[name])
    assert points.dtype == torch.float32
    assert_array_equal(points, np.concatenate(expected))


@pytest.mark.parametrize("name", ["gn", "nogn", "tricks"])
def test_forward(golden, filled_model, name):
    expected, model = golden("forward"), filled_model(name)
    draws = np.random.default_rng(0).uniform(-120, 140, (2, 3, *SMALL))
    with torch.no_grad():
        features = model.backbone(torch.from_numpy(draws.astype(np.float32)))
        levels = model.neck(features[1:])
        outputs = model.bbox_head(levels)
    if name == "gn":
        for k, feature in enumerate(features, 2):
            check_probe(expected, f"backbone.c{k}", feature, atol=5e-4)
        for k, level in enumerate(levels, 3):
            check_probe(expected, f"neck.p{k}", level, atol=5e-4)
    for k in range(5):
        check_probe(expected, f"{name}.cls.level{k}", outputs.logits[k], atol=5e-5)
        check_probe(expected, f"{name}.ctr.level{k}", outputs.centerness[k], atol=5e-5)
        check_distances(expected, name, k, outputs.distances[k])


def check_distances(expected, name, k, distances):
    kept = f"{name}.bbox.level{k}"
    assert_array_equal(distances.shape, expected[f"{kept}.shape"])
    found = distances.numpy().reshape(-1)[expected[f"{kept}.index"]]
    if name == "tricks":  # kept in pixels, put out in strides
        values = expected[f"{kept}.value"] / RECIPES[name].strides[k]
        assert_allclose(found, values, rtol=3e-5, atol=5e-5)
    else:
        assert_allclose(found, expected[f"{kept}.value"], rtol=3e-5, atol=3e-4)


@pytest.mark.parametrize("scale", ["256x320", "800x1344"])
@pytest.mark.parametrize("name", ["base", "center", "tricks"])
def test_targets(golden, real_truth, scale, name):
    expected = golden("targets")
    criterion = DetectionLoss(RECIPES["gn" if name == "base" else name], 80)
    positive, label, target = criterion.targets(SIZES[scale], *real_truth(scale))
    assert label[~positive].eq(BACKGROUND).all()
    label = torch.where(positive, label, 80)  # the original's label of the background
    assert_array_equal(label, expected[f"{scale}.{name}.labels"])
    assert_array_equal(positive.nonzero(), expected[f"{scale}.{name}.pos"])
    found = target[positive]
    assert_allclose(found, expected[f"{scale}.{name}.bbox_targets"], rtol=0, atol=1e-4)
    assert_allclose(centerness_of(found), expected[f"{scale}.{name}.centerness"], rtol=0, atol=1e-6)


def test_ground_truth(golden, recipe, tiny_train, real_truth):
    """The boxes that enter the targets are the ones our data gives, crowd left out, clipped."""
    expected = golden("targets")
    dataset = TrainingSet(tiny_train, recipe, seed=0)
    for scale, limits in (("256x320", (256, 320)), ("800x1344", (800, 1333))):
        for i, record in enumerate(golden_records(golden, tiny_train)):
            old = tuple(tiny_train.sizes[record].tolist())
            new = resized_size(*old, limits)
            assert_array_equal(new, expected[f"{scale}.img_shape.{i}"][:2])
            boxes, labels = dataset.ground_truth(record)
            boxes = scale_boxes(boxes, old, new)
            assert_array_equal(labels, expected[f"{scale}.gt_labels.{i}"])
            assert_allclose(boxes, expected[f"{scale}.gt_bboxes.{i}"], rtol=0, atol=1e-4)
            factor = np.float32([new[1] / old[1], new[0] / old[0]])
            assert_array_equal(factor, expected[f"{scale}.scale_factor.{i}"][:2])


def golden_records(golden, index, names="targets.files"):
    file, key = names.split(".", 1)
    position = {name.decode(): i for i, name in enumerate(index.file_names)}
    return [position[name] for name in golden(file)[key].reshape(-1).tolist()]


def random_outputs(seed, spread, strides):
    """Outputs drawn as the golden README says; `spread`: mean and deviation of class logits, mean
    and deviation of the distances' logarithm, deviation of centerness."""
    rng = np.random.default_rng(seed)
    cls_mean, cls_std, log_mean, log_std, ctr_std = spread
    levels = []
    for (rows, columns), stride in zip(SIZES["256x320"], strides, strict=True):
        levels.append(
            (
                rng.normal(cls_mean, cls_std, (2, 80, rows, columns)),
                stride * np.exp(rng.normal(log_mean, log_std, (2, 4, rows, columns))),
                rng.normal(0, ctr_std, (2, 1, rows, columns)),
            )
        )
    maps = [[torch.from_numpy(x.astype(np.float32)) for x in level] for level in levels]
    return Outputs(*zip(*maps, strict=True))


LOSS_SEEDS = {"base": 1, "one_empty": 1, "empty": 7, "tricks": 5}


def loss_outputs(case):
    strides = (1,) * 5 if case == "tricks" else RECIPES["gn"].strides
    return random_outputs(LOSS_SEEDS[case], (-3, 1, 1, 0.5, 1), strides)


def assert_gradient(found, expected, part):
    limit = np.abs(expected).max() if expected.any() else 1
    assert_allclose(found, expected, rtol=0, atol=part * limit)


@pytest.mark.parametrize("case", LOSS_SEEDS)
def test_loss_and_gradients(golden, real_truth, case):
    expected = golden("loss")
    outputs = loss_outputs(case)
    for x in (x for maps in outputs for x in maps):
        x.requires_grad_()
    boxes, labels, valid = real_truth("256x320")
    empty = {"one_empty": slice(1, 2), "empty": slice(0, 2)}.get(case, slice(0, 0))
    valid[empty] = False
    losses = DetectionLoss(RECIPES[RECIPE_OF[case]], 80)(outputs, boxes, labels, valid)
    losses["loss"].backward()
    for name in ("loss_cls", "loss_bbox", "loss_centerness"):
        assert_allclose(losses[name].item(), expected[f"{case}.{name}"], rtol=2e-6)
    grads = [torch.cat([x.grad.flatten() for x in maps]).numpy() for maps in outputs]
    kept = f"{case}.grad_cls"
    check_probe(expected, kept, torch.from_numpy(grads[0]), np.abs(grads[0]).max() * 1e-6)
    assert_gradient(grads[1], expected[f"{case}.grad_bbox"], 1e-5)
    assert_gradient(grads[2], expected[f"{case}.grad_ctr"], 1e-6)


def test_losses_of_two_ranks(golden, tmp_path):
    """Each of two processes holds one image; the normalisers are means over both."""
    expected = golden("loss")
    for rank, found in enumerate(run_ranks(tmp_path, "base")):
        for name in ("loss_cls", "loss_bbox", "loss_centerness", "grad_bbox_l2"):
            kept = expected[f"two_rank.rank{rank}.{name}"]
            assert_allclose(found[name], kept, rtol=5e-6 if name == "grad_bbox_l2" else 2e-6)


def run_ranks(folder, *words, world_size=2):
    """What each of the processes of rank_losses.py prints; they must all end in five minutes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fcos.rank_losses", str(folder / "store"), *words],
            env={**environment, "RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        return [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_ranks_without_boxes_do_not_hang(golden, tmp_path):
    """The original enters a second collective only where a rank has positives."""
    with_boxes, without = run_ranks(tmp_path, "one_empty")
    expected = golden("loss")
    # Means over ranks times equal shares of one batch: together they are the loss of the whole.
    for name in ("loss_cls", "loss_bbox", "loss_centerness"):
        mean = (with_boxes[name] + without[name]) / 2
        assert_allclose(mean, expected[f"one_empty.{name}"], rtol=2e-6)
    assert without["loss_bbox"] == without["loss_centerness"] == 0 == without["grad_bbox_l2"]
    assert with_boxes["grad_bbox_l2"] > 0


# The first update amplifies the rounding of a processor's convolutions in float32, up to 2e-5 of
# the second loss. In float64 that is the same everywhere.
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 5), (torch.float64, 2)])
@pytest.mark.parametrize("name", ["gn", "nogn"])
def test_training_steps(golden, filled_model, tiny_train, real_truth, name, dtype, steps):
    expected, recipe = golden("train"), RECIPES[name]
    images, sizes = [], []
    for record in golden_records(golden, tiny_train, "train.files"):
        image = read_image(tiny_train.path(record))
        size = resized_size(*image.shape[:2], (256, 320))
        canvas = torch.zeros(224, 320, 3, dtype=torch.uint8)
        canvas[: size[0], : size[1]] = torch.from_numpy(reference_resize(image, size))
        images.append(canvas)
        sizes.append(size)
    # In the original's layout: another one rounds elsewhere, and these steps amplify it.
    inputs = normalise(torch.stack(images), torch.tensor(sizes), recipe).contiguous()
    check_probe(expected, "img", inputs, atol=1e-4)

    inputs = inputs.to(dtype)
    model = filled_model(name).train().to(dtype)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if fixed(k)}
    before = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    assert list(before) == expected[f"{name}.param_names"].tolist()
    settings = json.loads(str(expected[f"{name}.optimizer"]))
    groups = param_groups(model, recipe)
    cpu = torch.device("cpu")
    rates = {key: settings[key] for key in ("lr", "momentum", "weight_decay")}
    assert (recipe.momentum, recipe.weight_decay) == (rates["momentum"], rates["weight_decay"])
    optimizer = build_sgd(groups, cpu, **rates)
    for group in optimizer.param_groups:
        group["lr"] = rates["lr"] * group["lr_factor"]
    criterion, precision = DetectionLoss(recipe, 80), Precision(cpu)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        losses = criterion(model(inputs), *real_truth("256x320"))
        losses["loss"].backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert len(norms) == len(before)
        norm = torch.stack(norms).norm().item()
        precision.step(optimizer, recipe.clip_norm)
        for key, loss in losses.items():
            exact = step == 0 or dtype is torch.float64
            rtol = 1e-5 if exact else 1e-3
            assert_allclose(loss.item(), expected[f"{name}.{key}"][step], rtol=rtol)
        assert_allclose(norm, expected[f"{name}.grad_norm"][step], rtol=1e-3)

    if steps < 5:
        return
    after = dict(model.named_parameters())
    for k, key in enumerate(before):
        norm = after[key].detach().double().norm()
        assert_allclose(norm, expected[f"{name}.param_l2"][k], rtol=2e-4)
        change = (after[key].detach().double() - before[key]).norm().item()
        if expected[f"{name}.param_delta_l2"][k] > 1e-3:
            assert_allclose(change, expected[f"{name}.param_delta_l2"][k], rtol=1e-2)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in frozen.items())


def fixed(key):
    """Whether training a pretrained network leaves the entry alone."""
    parts = key.split(".")
    if parts[0] != "backbone":
        return False
    norm = "bn" in parts[-2] or parts[-3:-1] == ["downsample", "1"]
    return norm or parts[1] in ("conv1", "layer1")


DETECT_SEEDS = {"base": (2, -6), "many": (4, -3.5), "tricks": (6, -6)}


def detection_outputs(case):
    seed, mean = DETECT_SEEDS[case]
    outputs = random_outputs(seed, (mean, 1.5, 1, 0.5, 1.5), RECIPES["gn"].strides)
    if case == "tricks":  # drawn in pixels
        strides = RECIPES["tricks"].strides
        units = zip(outputs.distances, strides, strict=True)
        outputs = outputs._replace(distances=tuple(x / stride for x, stride in units))
    return outputs


@pytest.mark.parametrize("unit", ["rescaled", "network"])
@pytest.mark.parametrize("case", DETECT_SEEDS)
def test_detections(golden, case, unit):
    expected, recipe = golden("detect"), RECIPES[RECIPE_OF[case]]
    outputs = detection_outputs(case)
    if case == "many":
        passed = [(x.sigmoid() > 0.05).sum((1, 2, 3)) for x in outputs.logits]
        assert (torch.stack(passed).sum(0) > 10_000).all()
    resized = torch.tensor([[240, 320], [213, 320]])
    factors = torch.ones(2, 2)
    if unit == "rescaled":
        factors = resized / torch.tensor([[480, 640], [427, 640]])
    for i, found in enumerate(detect_resized(outputs, resized, factors, recipe)):
        kept = f"{case}.{unit}.{i}"
        assert_array_equal(found.labels, expected[f"{kept}.labels"])
        assert_allclose(found.scores, expected[f"{kept}.scores"], rtol=0, atol=1e-6)
        assert_allclose(found.boxes, expected[f"{kept}.boxes"], rtol=0, atol=2e-3)
        assert found.boxes.dtype == found.scores.dtype == torch.float32


def test_detections_by_the_original_size(golden):
    """The door: the size in the input follows from the original one and the recipe's scale."""
    recipe = replace(RECIPES["gn"], img_scale=("256,320",))
    outputs = detection_outputs("base")
    found = detect(outputs, torch.tensor([[480, 640], [480, 640]]), recipe)[0]
    expected = golden("detect")
    assert_array_equal(found.labels, expected["base.rescaled.0.labels"])
    assert_allclose(found.boxes, expected["base.rescaled.0.boxes"], rtol=0, atol=2e-3)


def reference_resize(image, size):
    """OpenCV's INTER_LINEAR for uint8: weights of 11 bits, down first in precision, then up."""
    rows = image.astype(np.int64)
    first, second, *weights = weights_along(image.shape[1], size[1])
    rows = rows[:, first] * weights[0][:, None] + rows[:, second] * weights[1][:, None]
    first, second, *weights = weights_along(image.shape[0], size[0])
    parts = zip((first, second), weights, strict=True)
    total = sum((rows[at] >> 4) * weight[:, None, None] >> 16 for at, weight in parts)
    return ((total + 2) >> 2).astype(np.uint8)


def weights_along(old, new):
    """The two source positions of each of `new` pixels along a side of `old`, and their weights."""
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(place).astype(int)
    part = np.where((first < 0) | (first >= old - 1), 0, place - first).astype(np.float32)
    first = first.clip(0, old - 1)
    second = (first + 1).clip(max=old - 1)
    return first, second, *(np.rint(x * 2048).astype(np.int64) for x in (1 - part, part))


@pytest.mark.parametrize("case", ["pad32", "pad1344"])
@pytest.mark.parametrize("i", [0, 1])
def test_evaluation_input(golden, recipe, tiny_val, case, i):
    expected, name = golden("preprocess"), f"{case}.{i}"
    (record,) = golden_records(golden, tiny_val, f"preprocess.{name}.file")
    image = read_image(tiny_val.path(record))
    recipe = replace(recipe, eval_shapes="exact" if case == "pad32" else "square")
    size = resized_size(*image.shape[:2], (800, 1333))
    assert_array_equal(image.shape, expected[f"{name}.ori_shape"])
    assert_array_equal(size, expected[f"{name}.img_shape"][:2])
    found = prepare_image(image, recipe)
    check_input(expected, f"{name}.img", found)
    canvas = torch.zeros(1, *found.shape[1:], 3, dtype=torch.uint8)
    canvas[0, : size[0], : size[1]] = torch.from_numpy(reference_resize(image, size))
    exact = probe(normalise(canvas, torch.tensor([size]), recipe)[0].numpy())
    # With the same resize all is equal, but for a pixel in a thousand that rounds elsewhere.
    assert (np.abs(exact["value"] - expected[f"{name}.img.value"]) > 1e-4).mean() < 1e-3


def check_input(expected, name, found):
    """Equal but for rounding to grey levels in the resize."""
    found = probe(found.numpy())
    assert_array_equal(found["shape"], expected[f"{name}.shape"])
    difference = np.abs(found["value"] - expected[f"{name}.value"])
    assert difference.max() <= 1.01
    assert difference.mean() <= 0.3
    assert_allclose(found["l2"], expected[f"{name}.l2"], rtol=2e-3)


def test_training_input_with_flip(golden, recipe, tiny_train):
    expected = golden("preprocess")
    records = golden_records(golden, tiny_train, "preprocess.train_flip.files")
    recipe = replace(recipe, flip_probability=1.0, shapes="exact")
    dataset = TrainingSet(tiny_train, recipe, seed=0)
    batch = dataset.collate([dataset[0, 0, record] for record in records])
    for i in (0, 1):
        assert_array_equal(batch.resized_sizes[i], expected[f"train_flip.img_shape.{i}"][:2])
        boxes = batch.boxes[i, batch.valid[i]]
        assert_allclose(boxes, expected[f"train_flip.gt_bboxes.{i}"], rtol=0, atol=1e-4)
        labels = batch.labels[i, batch.valid[i]]
        assert_array_equal(labels, expected[f"train_flip.gt_labels.{i}"])
    found = normalise(batch.images, batch.resized_sizes, recipe)
    check_input(expected, "train_flip.img", found)


LR_ROWS = {"gn": "rows", "nogn": "rows", "tricks": "tricks_rows", "gn_2x": "two_x_rows"}


@pytest.mark.parametrize("name", LR_ROWS)
@pytest.mark.parametrize("ranks", [(4, 4), (8, 2), (1, 16)])
def test_learning_rate(golden, name, ranks):
    expected, recipe = golden("lr"), RECIPES[name]
    model = build_model(replace(recipe, backbone="resnet14", channels=64), 80)
    factors = [group["lr_factor"] for group in param_groups(model, recipe)]
    for iteration, epoch, *rates in expected[LR_ROWS[name]]:
        assert iteration // expected["iterations_per_epoch"] == epoch
        lr = recipe.lr_at(iteration, expected["iterations_per_epoch"], *ranks)
        found = [lr * factor for factor in factors]
        assert found == pytest.approx(rates, rel=1e-12, abs=0)
