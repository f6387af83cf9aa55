"""Every golden file of m2det, within the tolerances of its README."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from common import flags
from common.coco.evaluation import to_result_rows
from common.coco.images import read_image
from common.npu.operators import first_max
from common.npu.precision import build_sgd
from m2det.anchors import encode, make_anchors, to_cxcywh
from m2det.config import RECIPES
from m2det.data import prepare_image
from m2det.loss import DetectionLoss
from m2det.model import build_model
from m2det.postprocess import decode_outputs, detect, submission_boxes
from m2det.targets import assign, pairwise_iou
from tests.golden.fill import probe
from tests.m2det.conftest import pad


def check_probe(golden, name, array, atol, rtol=1e-5, seed=0):
    array = np.asarray(array.detach() if isinstance(array, torch.Tensor) else array)
    found = probe(array, seed, count=len(golden[f"{name}/index"]))
    assert_array_equal(found["index"], golden[f"{name}/index"])
    assert_array_equal(found["shape"], golden[f"{name}/shape"])
    assert_allclose(found["value"], golden[f"{name}/value"], rtol=0, atol=atol)
    assert_allclose(found["l1"], golden[f"{name}/l1"], rtol=rtol)
    assert_allclose(found["l2"], golden[f"{name}/l2"], rtol=rtol)


def meta_keys(recipe):
    with torch.device("meta"):
        state = build_model(recipe, 80).state_dict()
    return [[key, list(value.shape)] for key, value in state.items()]


def test_keys(golden, recipe):
    for name in ("512_vgg", "320_vgg", "704_vgg", "800_vgg"):
        assert meta_keys(RECIPES[name]) == golden("keys")
    extra = [
        entry for entry in meta_keys(replace(recipe, sfam=True)) if entry not in golden("keys")
    ]
    assert extra == golden("keys_sfam")
    resnet = meta_keys(RECIPES["320_resnet101"])
    base = [entry for entry in resnet if entry[0].startswith("base.")]
    assert base == golden("keys_resnet101_base")
    names = [key for key, _ in golden("keys") if not key.startswith("base.")]
    assert [key for key, _ in resnet if not key.startswith("base.")] == names
    assert ["up_reduce.conv.weight", [512, 2048, 1, 1]] in resnet


@pytest.mark.parametrize("name", ["320_vgg", "512_vgg", "704_vgg", "800_vgg"])
def test_anchors(golden, name):
    anchors = make_anchors(RECIPES[name])
    assert anchors.dtype == torch.float32
    assert_array_equal(anchors.numpy(), golden("anchors")[f"m2det{name}"])


FORWARD = {  # tag: recipe, its changed fields, images
    "m2det512_vgg": ("512_vgg", {}, 1),
    "m2det320_vgg": ("320_vgg", {}, 2),
    "m2det320_vgg_sfam": ("320_vgg", {"sfam": True}, 1),
    "m2det320_resnet101": ("320_resnet101", {}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("tag", FORWARD)
def test_forward(golden, filled_model, tag):
    name, fields, images = FORWARD[tag]
    recipe = RECIPES[name]
    model = filled_model(name, **fields)
    inner = {}

    def keep(key, position=None):
        def hook(module, args, output):
            inner[key] = output if position is None else output[position]

        return hook

    hooks = [
        module.register_forward_hook(keep(key, position))
        for key, module, position in (
            ("reduce", model.reduce, None),
            ("up_reduce", model.up_reduce, None),
            ("leach", model.leach[0], None),
            ("unet1_largest", model.unet1, -1),
            ("unet8_largest", model.unet8, -1),
            ("unet8_smallest", model.unet8, 0),
            ("norm_source0", model.Norm, None),
        )
    ]
    rng = np.random.default_rng(list(FORWARD).index(tag))
    shape = (images, 3, recipe.image_size, recipe.image_size)
    with torch.no_grad():
        outputs = model(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)))
    for hook in hooks:
        hook.remove()

    expected = golden("forward")
    cells = np.square(recipe.anchor_maps) * 6
    for seed, (part, found) in enumerate(zip(("loc", "conf"), outputs, strict=True)):
        deviations = expected[f"{tag}/level_std"][:, seed]
        levels = found.split(cells.tolist(), dim=1)
        stds = [level.std(correction=0).item() for level in levels]
        assert_allclose(stds, deviations, rtol=1e-4)
        # By level: a probe of the whole, with each entry's own tolerance.
        entries = probe(found.numpy(), seed)
        channels = found.shape[2]
        anchor = entries["index"] // channels % found.shape[1]
        level = np.searchsorted(np.cumsum(cells), anchor, side="right")
        difference = np.abs(entries["value"] - expected[f"{tag}/{part}/value"])
        assert_array_equal(entries["index"], expected[f"{tag}/{part}/index"])
        assert (difference <= 5e-5 * deviations[level]).all()
        assert_allclose(entries["l2"], expected[f"{tag}/{part}/l2"], rtol=1e-5)
    for key, found in inner.items():
        check_probe(expected, f"{tag}/mid_{key}", found, atol=5e-5 * found.std().item())


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_targets(golden, recipe, case):
    expected = {
        name.split("/", 1)[1]: value
        for name, value in golden("targets").items()
        if name.startswith(f"{case}/")
    }
    boxes, labels, valid = pad([expected["gt"]])
    criterion = DetectionLoss(recipe, 80)
    positive, target, channel = criterion.targets(boxes, labels, valid)
    index = positive[0].nonzero().squeeze(1)
    assert_array_equal(index, expected["pos_index"])
    assert_array_equal(channel[0, index], expected["pos_label"])
    assert channel[~positive].eq(0).all()
    assert_allclose(target[0, index], expected["pos_loc"], rtol=0, atol=1e-4)
    if case == 3:
        return

    iou = pairwise_iou(boxes[:, valid[0]], criterion.anchors_xyxy)[0]
    best, anchor = first_max(iou, dim=1)
    assert_array_equal(anchor, expected["best_prior_of_gt"])
    assert_array_equal(best, expected["best_iou_of_gt"])

    # The original also encodes what is not positive.
    _, matched, label = assign(criterion.anchors_xyxy, boxes, labels, valid, recipe.match_iou)
    assert_array_equal(label[0, index] + 1, expected["pos_label"])
    every = encode(to_cxcywh(boxes[0, matched[0]]), criterion.anchors, recipe)
    check_probe(expected, "loc_all", every, atol=2e-4)


CASES = {"real": ([0, 1], 0), "with_empty": ([0, 3], 4), "all_empty": ([3, 3], 4)}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(golden, recipe, case):
    chosen, bias = CASES[case]
    rng = np.random.default_rng(5 + list(CASES).index(case))
    loc = rng.standard_normal((2, 32760, 4)).astype(np.float32)
    conf = rng.standard_normal((2, 32760, 81)).astype(np.float32)
    conf[:, :, 0] += np.float32(bias)
    outputs = [torch.from_numpy(x).requires_grad_() for x in (loc, conf)]
    truth = pad([golden("targets")[f"{k}/gt"] for k in chosen])
    losses = DetectionLoss(recipe, 80)(outputs, *truth)
    losses["loss"].backward()

    expected = {
        name.split("/", 1)[1]: value
        for name, value in golden("loss").items()
        if name.startswith(f"{case}/")
    }
    assert_allclose(losses["loss_bbox"].item(), expected["loss_l"], rtol=1e-5)
    assert_allclose(losses["loss_cls"].item(), expected["loss_c"], rtol=1e-5)
    for grad, name in ((outputs[0].grad, "loc"), (outputs[1].grad, "conf")):
        check_probe(expected, f"grad_{name}", grad, atol=1e-7)
        rows = grad.flatten(0, 1)
        assert_array_equal((rows != 0).any(dim=1).nonzero().squeeze(1), expected[f"{name}_rows"])
        sample = expected["conf_rows_sample" if name == "conf" else "loc_rows"]
        assert_allclose(rows[sample], expected[f"grad_{name}_rows"], rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, pytest.param(5, marks=pytest.mark.again)])
def test_training_steps(golden, recipe, filled_model, tiny_train, steps):
    expected = golden("train")
    rates = {name: float(expected[name]) for name in ("lr", "momentum", "weight_decay")}
    record = int(np.flatnonzero(tiny_train.image_ids == expected["image_id"])[0])
    image = prepare_image(read_image(tiny_train.path(record)), recipe).unsqueeze(0)
    truth = pad([expected["gt"]], slots=16)
    model = copy.deepcopy(filled_model("512_vgg")).train()
    start = {key: model.state_dict()[key].clone() for key in expected["names"]}
    criterion = DetectionLoss(recipe, 80)
    assert len(list(model.parameters())) == 449
    optimizer = build_sgd(list(model.parameters()), torch.device("cpu"), **rates)
    found = {"loss_l": [], "loss_c": [], "grad_norm": []}
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        losses = criterion(model(image), *truth)
        losses["loss"].backward()
        norms = torch._foreach_norm([p.grad for p in model.parameters()])
        found["grad_norm"].append(torch.stack(norms).double().norm().item())
        optimizer.step()
        found["loss_l"].append(losses["loss_bbox"].item())
        found["loss_c"].append(losses["loss_cls"].item())
    tolerances = ((1e-5, 1e-3), (1e-4, 1e-2), (3e-3, 5e-2), (3e-3, 5e-2), (3e-3, 5e-2))
    for step, (loss_rtol, norm_rtol) in enumerate(tolerances[:steps]):
        for name, rtol in (("loss_l", loss_rtol), ("loss_c", loss_rtol), ("grad_norm", norm_rtol)):
            assert_allclose(found[name][step], expected[name][step], rtol=rtol, err_msg=name)
    if steps < 5:  # the golden weights are those after five
        return
    state = model.state_dict()
    for key, l1, l2, moved in zip(
        *(expected[name] for name in ("names", "l1", "l2", "delta_l2")), strict=True
    ):
        value = state[key].double()
        assert_allclose(value.norm(), l2, rtol=5e-5, err_msg=key)
        assert_allclose(value.abs().sum(), l1, rtol=5e-5, err_msg=key)
        if moved > 1e-6:
            assert_allclose((value - start[key]).norm(), moved, rtol=3e-2, err_msg=key)
    total = torch.stack([p.detach().double().norm() for p in model.parameters()]).norm()
    assert_allclose(total, expected["all_param_l2"], rtol=5e-5)
    assert state["leach.0.bn.num_batches_tracked"] == expected["leach_tracked"]
    assert state["Norm.num_batches_tracked"] == expected["norm_tracked"]
    for name in sorted(key for key in expected if key.endswith("/value")):
        key = name.removeprefix("param/").removesuffix("/value")
        check_probe(expected, f"param/{key}", state[key], atol=1e-4, rtol=5e-5)


@pytest.mark.parametrize(
    ("case", "argv", "world_size"),
    [
        ("port_512_8p_b128", [], 8),
        ("port_512_1p_b16", [], 1),
        ("original_512_b16", ["--lr=0.004"], 1),
        ("original_512_b16", ["--recipe=512_vgg_original"], 1),
    ],
)
def test_learning_rate(golden, case, argv, world_size):
    expected = golden("lr")[case]
    parser = flags.make_parser("", recipes=RECIPES)
    recipe = flags.chosen_recipe(parser.parse_args(argv), RECIPES)
    found = [
        recipe.lr_at(iteration, expected["epoch_size"], world_size, recipe.batch_size)
        for iteration in expected["iterations"]
    ]
    assert found == pytest.approx(expected["lr"], rel=1e-9, abs=0)
    assert expected["max_iter"] == recipe.epochs * expected["epoch_size"]


def detection_outputs(recipe, case):
    rng = np.random.default_rng(9 if case == "soft2" else 8)
    count = 32760
    loc = (0.5 * rng.standard_normal((count, 4))).astype(np.float32)
    conf = rng.standard_normal((count, 81)).astype(np.float32)
    conf[:, 0] += 8
    at, cl = rng.integers(64, count - 64, 24), rng.integers(1, 13, 24)
    for a, c in zip(at, cl, strict=True):
        conf[a - 60 : a + 60, c] += 9
    return torch.from_numpy(loc).unsqueeze(0), torch.from_numpy(conf).unsqueeze(0)


@pytest.mark.parametrize("case", ["soft", "soft2", "hard"])
def test_detections(golden, recipe, case):
    expected = {
        name.split("/", 1)[1]: value
        for name, value in golden("detect").items()
        if name.startswith(f"{case}/")
    }
    outputs = detection_outputs(recipe, case)
    recipe = replace(recipe, nms="hard" if case == "hard" else "soft")
    width, height = expected["size_wh"].tolist()
    scale = torch.tensor([width, height, width, height])
    boxes, scores = decode_outputs(outputs, make_anchors(recipe), recipe)
    check_probe(expected, "decoded_box", boxes[0] * scale, atol=1e-3)
    check_probe(expected, "score_all", scores[0], atol=5e-5)
    candidates = (scores[0, :, 1:] > recipe.score_threshold).sum(dim=0)
    assert_array_equal(candidates, expected["candidates_per_class"][1:])

    (found,) = detect(outputs, torch.tensor([[height, width]]), recipe)
    assert (found.scores.diff() <= 0).all()
    order = np.argsort(
        found.labels.numpy(), kind="stable"
    )  # the golden's: by class, as they were taken
    assert_array_equal(found.labels[order] + 1, expected["label"])
    assert_allclose(found.scores[order], expected["score"], rtol=0, atol=5e-5)
    clipped = np.clip(expected["box"], 0, scale.numpy())
    assert_allclose(found.boxes[order], clipped, rtol=0, atol=1e-3)
    if case == "soft2":
        rows = to_result_rows(
            1, submission_boxes(found.boxes.numpy(), recipe), found.scores, found.labels, range(80)
        )
        theirs = expected["coco_bbox_xywh"].copy()
        theirs[:, 2:] += theirs[:, :2] - 1
        theirs = np.clip(theirs, 0, scale.numpy())
        theirs[:, 2:] += 1 - theirs[:, :2]
        assert_allclose(rows[order, 1:5], theirs, rtol=0, atol=1e-3)
        assert_allclose(rows[order, 5], expected["coco_score"], rtol=0, atol=5e-5)
