from dataclasses import asdict, replace

import pytest
import torch

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from fcos.config import RECIPES
from fcos.model import build_model
from fcos.weights import (
    backbone_of,
    class_names_of,
    load_weights,
    main,
    mean_of,
    note_on_preset,
    num_classes_of,
    published_state_dict,
    recipe_of_checkpoint,
)


@pytest.fixture(scope="session")
def filled_state(filled_state):
    """The golden values, with the statistics that caffe's batch norm has."""

    def state(name):
        values = dict(filled_state(name))
        for key, value in values.items():
            if key.startswith("backbone.") and key.endswith("running_mean"):
                values[key] = torch.zeros_like(value)
        return values

    return state


@pytest.fixture
def model():
    torch.manual_seed(1)
    return build_model(RECIPES["gn"], 80)


def assert_holds(model, expected, keys):
    state = model.state_dict()
    for key in keys:
        assert torch.equal(state[key], expected[key]), key


def runner_file(state, **meta):
    """As an MMCV runner writes it: one group per parameter."""
    groups = [{"lr": 0.01, "momentum": 0.9, "params": [k]} for k in range(210)]
    meta = {"epoch": 12, "iter": 87960, "CLASSES": ("person",) * 80, "seed": 0, **meta}
    optimizer = {"state": {92: {"momentum_buffer": torch.ones(3)}}, "param_groups": groups}
    return {"meta": meta, "state_dict": state, "optimizer": optimizer}


@pytest.mark.parametrize("name", ["gn", "nogn", "tricks"])
def test_mmdetections_checkpoint(filled_state, tmp_path, name):
    model = build_model(RECIPES[name], 80)
    torch.save(runner_file(filled_state(name)), tmp_path / "epoch_12.pth")
    report = load_weights(model, tmp_path / "epoch_12.pth")
    assert report.unknown == report.reinitialised == report.missing == ()
    assert_holds(model, filled_state(name), filled_state(name))
    published = published_state_dict(model)
    assert list(published) == list(filled_state(name))


@pytest.mark.parametrize(
    ("name", "layout"), [("gn", "mmdet2"), ("nogn", "mmdet3"), ("tricks", "mmdet3")]
)
def test_an_exported_file_is_mmdetections(golden, filled_state, tmp_path, name, layout):
    """By its keys and shapes, all of them; it loads here as well."""
    classes = [f"class {number}" for number in range(80)]
    state = {"model": filled_state(name), "recipe": asdict(RECIPES[name]), "classes": classes}
    torch.save(state, tmp_path / "best.pt")
    out = tmp_path / "fcos.pth"
    main(["export", str(tmp_path / "best.pt"), str(out), f"--layout={layout}"])
    written = torch.load(out, weights_only=True)
    shapes = [[key, list(value.shape)] for key, value in written["state_dict"].items()]
    assert shapes == golden("keys" if name == "gn" else f"keys_{name}")
    assert written["meta"]["CLASSES"] == tuple(classes)
    has_dataset_meta = written["meta"].get("dataset_meta") == {"classes": tuple(classes)}
    assert has_dataset_meta == (layout == "mmdet3")
    again = build_model(RECIPES[name], 80)
    load_weights(again, out).require_complete("fcos.pth")
    assert_holds(again, filled_state(name), filled_state(name))


def test_early_names_and_the_prefix_of_distributed_runs(model, filled_state):
    early = {}
    for key, value in filled_state("gn").items():
        for name in ("cls", "reg", "centerness"):
            key = key.replace(f"bbox_head.conv_{name}.", f"bbox_head.fcos_{name}.")
        early[f"module.{key}"] = value
    assert sum("fcos_" in key for key in early) == 6
    report = load_weights(model, {"state_dict": early})
    assert report.unknown == report.missing == ()
    assert_holds(model, filled_state("gn"), filled_state("gn"))


def backbone_file(filled_state, kind):
    """The keys of MMDetection's two caffe files, as their load warnings list them."""
    state = {}
    for key, value in filled_state("gn").items():
        key = key.removeprefix("backbone.")
        if key.startswith(("neck", "bbox_head")) or key.endswith("num_batches_tracked"):
            continue
        if key.endswith("running_mean"):
            value = torch.zeros_like(value)
        state[key] = torch.ones_like(value) if key.endswith("running_var") else value
        convolution = value.dim() == 4
        if convolution and (kind == "detectron" or key == "conv1.weight"):
            state[key.replace("weight", "bias")] = torch.zeros(len(value))
    return state


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(("kind", "extra"), [("detectron", 53), ("detectron2", 1)])
def test_caffe_backbones(model, filled_state, tmp_path, kind, extra, wrapped):
    state = backbone_file(filled_state, kind)
    assert sum(key.split(".")[-2][-1] != "n" and key.endswith("bias") for key in state) > extra
    biases = {key for key in state if key[:-4] + "running_mean" not in state} - {
        key for key in state if not key.endswith("bias")
    }
    assert len(biases) == extra
    path = tmp_path / "resnet50_caffe.pth"
    torch.save({"state_dict": state} if wrapped else state, path)
    before = published_state_dict(model)
    report = load_weights(model, path)
    assert set(report.loaded) == {f"backbone.{key}" for key in set(state) - biases}
    assert report.unknown == report.reinitialised == ()
    assert_holds(model, {f"backbone.{k}": v for k, v in state.items()}, report.loaded)
    assert_holds(model, before, report.missing)
    assert all(
        not key.startswith("backbone.") or key.endswith("num_batches_tracked")
        for key in report.missing
    )
    mean = mean_of(torch.load(path, weights_only=True))
    assert mean == RECIPES["gn" if kind == "detectron" else "tricks"].mean


def test_a_bias_that_is_not_zero_is_told(model, filled_state):
    state = backbone_file(filled_state, "detectron2")
    state["conv1.bias"][3] = 0.5
    report = load_weights(model, state)
    assert report.unknown == ("backbone.conv1.bias",)
    assert "1 not used: backbone.conv1.bias" in str(report)


def test_the_mean_of_other_files_is_not_known(filled_state):
    assert mean_of({"state_dict": filled_state("gn")}) is None
    assert mean_of({"layer1.0.conv1.weight": torch.zeros(1)}) is None


def test_torchvisions_resnet_is_refused(model):
    resnet50 = pytest.importorskip("torchvision.models").resnet50
    theirs = resnet50().state_dict()
    with pytest.raises(UserError, match=r"resnet\.pth: not a caffe ResNet-50"):
        load_weights(model, {**theirs, "path": "resnet.pth"})
    theirs["bn1.running_mean"] += 1
    del theirs["fc.weight"], theirs["fc.bias"]
    with pytest.raises(UserError, match="not a caffe ResNet-50"):
        load_weights(model, theirs)


def test_a_file_whose_backbone_does_not_fit_is_refused(model, filled_state):
    heads = {k: v for k, v in filled_state("gn").items() if not k.startswith("backbone.")}
    with pytest.raises(
        UserError,
        match=r"other\.pth: it is an FCOS detector; its weights .*: 265 missing",
    ):
        load_weights(model, {"state_dict": heads, "path": "other.pth"})


def test_heads_of_other_classes_start_anew(filled_state):
    model = build_model(RECIPES["gn"], 3)
    before = published_state_dict(model)
    report = load_weights(model, filled_state("gn"))
    assert report.reinitialised == ("bbox_head.conv_cls.weight", "bbox_head.conv_cls.bias")
    assert_holds(model, before, report.reinitialised)
    assert_holds(model, filled_state("gn"), ["bbox_head.cls_convs.0.gn.weight"])
    with pytest.raises(UserError, match=r"f\.pth: .*2 re-initialised .* trained on these classes"):
        report.require_complete("f.pth")


def test_evaluation_demands_a_whole_detector(model, filled_state):
    state = filled_state("gn")
    whole = load_weights(model, {k: v for k, v in state.items() if "num_batches" not in k})
    assert whole.require_complete("f.pth") is whole
    part = load_weights(model, {k: v for k, v in state.items() if k.startswith("backbone.")})
    with pytest.raises(UserError, match=r"f\.pth: .* missing, left as initialised"):
        part.require_complete("f.pth")


def test_classes_of_a_checkpoint(filled_state):
    state = filled_state("gn")
    assert num_classes_of(runner_file(state)) == 80
    names = tuple(f"name {label}" for label in range(80))
    assert class_names_of(runner_file(state, CLASSES=names)) == names
    assert class_names_of({"model": state, "classes": list(names)}) == names
    meta = {"dataset_meta": {"classes": names}}
    assert class_names_of({"state_dict": state, "meta": meta}) == names
    for unknown in (object(), {"CLASSES": object()}, {"dataset_meta": object()}):
        assert class_names_of({"state_dict": state, "meta": unknown}) == COCO_CLASSES
    assert class_names_of({"state_dict": state})[0] == "person"
    with pytest.raises(
        UserError, match=r"^r50\.pth: no detection heads \(1 tensors: conv1\.weight\); give"
    ):
        num_classes_of({"conv1.weight": torch.zeros(1), "path": "r50.pth"})


@pytest.mark.parametrize("name", ["gn", "nogn", "tricks"])
def test_a_published_checkpoint_shows_its_network(filled_state, name):
    state = {**runner_file(filled_state(name)), "path": "epoch_12.pth"}
    for requested in ("gn", "nogn", "tricks"):
        recipe = recipe_of_checkpoint(RECIPES[requested], state)
        assert recipe.head_norm == RECIPES[name].head_norm
    recipe = recipe_of_checkpoint(replace(RECIPES["gn_2x"], max_detections=7), state)
    assert recipe.max_detections == 7
    for field in ("head_norm", "conv_bias", "norm_on_bbox", "centerness_on_reg", "mean", "nms_iou"):
        assert getattr(recipe, field) == getattr(RECIPES[name], field), field


def test_the_users_nms_iou_stays(filled_state):
    state = {**runner_file(filled_state("tricks")), "path": "epoch_24.pth"}
    for requested in (0.4, 0.7):
        recipe = replace(RECIPES["gn"], nms_iou=requested)
        assert recipe_of_checkpoint(recipe, state).nms_iou == requested
    assert recipe_of_checkpoint(RECIPES["gn"], state).nms_iou == 0.6
    # A flag may name the value of a preset.
    assert recipe_of_checkpoint(RECIPES["gn"], state, user_fields=["nms_iou"]).nms_iou == 0.5
    gn = runner_file(filled_state("gn"))
    assert recipe_of_checkpoint(RECIPES["tricks"], gn).nms_iou == 0.5


def with_resnet101(tensors):
    """The state dict of the same detector with a ResNet-101.

    Its third stage has 23 blocks instead of 6, which are like the sixth one.
    """
    deeper = {}
    for key, value in tensors.items():
        deeper[key] = value
        if "layer3.5." in key:
            for block in range(6, 23):
                deeper[key.replace("layer3.5.", f"layer3.{block}.")] = value
    return deeper


@pytest.mark.parametrize("name", ["gn", "nogn", "tricks"])
def test_a_detector_with_a_resnet101(filled_state, name):
    """Names and shapes as MMDetection has them load whole; the file decides depth and head."""
    tensors = with_resnet101(filled_state(name))
    state = {**runner_file(tensors), "path": "r101.pth"}
    requested = RECIPES["r101_gn" if name == "nogn" else "gn"]
    recipe = recipe_of_checkpoint(requested, state)
    assert recipe.backbone == "resnet101"
    assert recipe.head_norm == RECIPES[name].head_norm
    assert recipe.nms_iou == RECIPES[name].nms_iou
    network = build_model(recipe, 80)
    report = load_weights(network, state)
    assert report.require_complete("r101.pth") is report
    assert published_state_dict(network).keys() == tensors.keys()
    assert_holds(network, tensors, tensors)


def test_what_is_taken_from_a_published_file_is_said(filled_state):
    r50 = {**runner_file(filled_state("nogn")), "path": "r50.pth"}
    r101 = {**runner_file(with_resnet101(filled_state("nogn"))), "path": "r101.pth"}
    assert note_on_preset(RECIPES["nogn"], r50) is None
    assert note_on_preset(RECIPES["gn"], r50) == (
        "r50.pth: has the head of --recipe=nogn, which is taken"
    )
    assert note_on_preset(RECIPES["nogn"], r101) == (
        "r101.pth: has the backbone resnet101, which is taken"
    )
    assert note_on_preset(RECIPES["gn"], r101) == (
        "r101.pth: has the head of --recipe=nogn and the backbone resnet101, which are taken"
    )
    assert recipe_of_checkpoint(RECIPES["r101_gn"], r50).backbone == "resnet50"


@pytest.mark.parametrize(("kind", "extra"), [("detectron", 104), ("detectron2", 1)])
def test_a_caffe_resnet101(filled_state, kind, extra):
    """It is loaded by a recipe with that backbone and changes no recipe."""
    state = {**with_resnet101(backbone_file(filled_state, kind)), "path": "resnet101.pth"}
    for recipe in (RECIPES["gn"], RECIPES["r101_gn"]):
        assert recipe_of_checkpoint(recipe, state) == recipe
    assert mean_of(state) == RECIPES["gn" if kind == "detectron" else "tricks"].mean
    with pytest.raises(UserError, match=r"^resnet101\.pth: it is a ResNet-101; its weights"):
        load_weights(build_model(RECIPES["gn"], 80), state)
    network = build_model(RECIPES["r101_gn"], 80)
    report = load_weights(network, state)
    assert report.unknown == report.reinitialised == ()
    in_network = {key for key in network.state_dict() if key.startswith("backbone.")}
    in_network -= {key for key in in_network if key.endswith("num_batches_tracked")}
    assert set(report.loaded) == in_network
    assert len(state) - 1 - len(in_network) == extra


def test_a_deformable_backbone_is_named(model, filled_state):
    state = {**filled_state("gn"), "path": "dcn.pth"}
    state["backbone.layer2.0.conv2.conv_offset.weight"] = torch.zeros(27, 128, 3, 3)
    with pytest.raises(UserError, match=r"^dcn\.pth: it is .* with deformable convolutions; its"):
        load_weights(model, state)


def test_an_unknown_backbone_is_none(filled_state):
    state = filled_state("gn")
    assert backbone_of(state) == "resnet50"
    assert backbone_of({**state, "backbone.layer3.6.conv1.weight": torch.zeros(1)}) is None


def test_a_checkpoint_without_a_head_changes_nothing():
    assert recipe_of_checkpoint(RECIPES["center"], {"state_dict": {}}) == RECIPES["center"]
