"""Checkpoints of all models and of other projects, through the programs of each model."""

import json
import re
import sys
from collections import OrderedDict
from dataclasses import asdict, replace
from typing import ClassVar

import pytest
import torch
from PIL import Image

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from common.npu import checkpoint
from common.npu.identify import model_of
from common.npu.weights import tensors_of as tensors_of_checkpoint
from tests.scripts import TINY
from tests.small_models import ALL, MODELS, SMALL, TFRECORD, module, run_state, small_recipe

# A flag that a checkpoint of the small network contradicts, and what it says itself.
CONTRADICTION = {
    "ssd_mmdet": ("--width=0.5", "--width 0.5: FILE was trained with 0.0625; omit it"),
    "ssd_resnet34": (
        "--backbone=resnet18",
        "--backbone resnet18: FILE was trained with resnet10; omit it",
    ),
    "m2det": ("--sfam", "--sfam True: FILE was trained with False; omit it"),
    "fcos": ("--head_norm=none", "--head_norm none: FILE was trained with gn; omit it"),
    TFRECORD: (
        "--backbone=resnet18",
        "--backbone resnet18: FILE was trained with resnet10; omit it",
    ),
}


EXPORTS = {"fcos": "pthtar2onx"}


def programs(model, file, folder):
    """Each program of a model that reads a checkpoint, as a function of further flags."""

    def program(name, *words):
        entry = module(model, name).main
        return lambda *flags: entry([*words, *flags])

    where = (f"--data={TINY}", "--device=cpu", f"--output_dir={folder / 'out'}")
    export = EXPORTS.get(model, "pthtar2onnx")
    if model == TFRECORD:
        train = (
            "--device=cpu",
            f"--model_dir={folder / 'out'}",
            "--training_file_pattern=none",
            "--validation_file_pattern=none",
            "--val_json_file=none",
        )
        evaluate = (*train[:1], f"--model_dir={file.parent}", *train[2:])
        return {
            "train": program("train", *train, "--resume=none", f"--resnet_checkpoint={file}"),
            "resume": program("train", *train, f"--resume={file}"),
            "evaluate": program("evaluate", *evaluate),
            "export": program(export, f"--checkpoint={file}"),
        }
    return {
        "train": program("train", *where, f"--checkpoint={file}"),
        "resume": program("train", *where, f"--resume={file}"),
        "evaluate": program("evaluate", *where, f"--checkpoint={file}"),
        "demo": program("demo", "--device=cpu", f"--checkpoint={file}"),
        "export": program(export, f"--checkpoint={file}"),
        "weights": lambda: module(model, "weights").main(["export", str(file), f"{folder}/a.pth"]),
    }


# ---- another model's file


@pytest.mark.parametrize("writer", ALL)
@pytest.mark.parametrize("reader", ALL)
def test_another_models_file_is_refused_in_one_line(reader, writer, tmp_path):
    """By every program, with the name that it has now, and without it as before."""
    if reader == writer:
        return
    mark = SMALL[writer][2]
    for written_by in (writer, None):
        file = tmp_path / str(bool(written_by)) / "iter_1.pt"
        state = run_state(writer, {mark: torch.zeros(4)}, written_by=written_by)
        checkpoint.save(file, state)
        for program in programs(reader, file, tmp_path).values():
            with pytest.raises(UserError) as error:
                program()
            assert str(error.value) == (
                f"{file}: a detector of {writer}, not of {reader}; "
                f"give one of {reader}, or use the programs of {writer}"
            )
    assert not (tmp_path / "out").exists()


# ---- the network is the checkpoint's


class NetworkBuiltError(Exception):
    """Raised in place of building the network, with its recipe."""


@pytest.fixture
def network_of(monkeypatch):
    """`network_of(model, program)`: the recipe that a program builds its network from."""

    def capture(recipe, num_classes):
        raise NetworkBuiltError(recipe)

    def call(model, program, *flags):
        for name in ("train", "detector"):
            monkeypatch.setattr(module(model, name), "build_model", capture)
        with pytest.raises(NetworkBuiltError) as built:
            program(*flags)
        return built.value.args[0]

    return call


@pytest.mark.parametrize("model", MODELS)
def test_every_program_takes_the_network_of_the_checkpoint(
    model, detectors, network_of, tmp_path, capsys
):
    expected = small_recipe(model)
    reading = programs(model, detectors[model], tmp_path)
    for name in ("train", "evaluate", "demo", "export"):
        recipe = network_of(model, reading[name])
        for field in module(model, "weights").NETWORK:
            assert getattr(recipe, field) == getattr(expected, field), (name, field)
    assert "its network is trained: " in capsys.readouterr().out  # by train.py


def test_the_tfrecord_recipe_takes_the_network_of_the_checkpoint(
    detectors, network_of, tmp_path, monkeypatch, capsys
):
    reading = programs(TFRECORD, detectors[TFRECORD], tmp_path)
    for name in ("evaluate", "export"):
        assert network_of(TFRECORD, reading[name]).backbone == "resnet10"
    train = module(TFRECORD, "train")

    def stop(run, *args):
        raise NetworkBuiltError

    monkeypatch.setattr(train, "read_training_records", stop)
    with pytest.raises(NetworkBuiltError):
        reading["train"]()
    assert "backbone 'resnet10' instead of 'resnet34'" in capsys.readouterr().out


@pytest.mark.parametrize("model", ALL)
def test_a_flag_that_contradicts_the_checkpoint_is_an_error_that_says_both(
    model, detectors, tmp_path
):
    file = detectors[model]
    flag, line = CONTRADICTION[model]
    reading = programs(model, file, tmp_path)
    for name in ("train", "evaluate"):
        with pytest.raises(UserError) as error:
            reading[name](flag)
        assert str(error.value) == line.replace("FILE", str(file))


@pytest.mark.parametrize("model", MODELS)
def test_the_name_is_the_users(model, detectors, tmp_path, monkeypatch):
    names = []

    def note(output_dir, network, **facts):
        names.append(network)
        return []

    class Result:
        """An evaluation of no detections."""

        stats: ClassVar = {"AP": 0.0}

    evaluate = module(model, "evaluate")
    monkeypatch.setattr(evaluate, "detect_all", lambda *args: ())
    monkeypatch.setattr(evaluate, "evaluate_and_save", lambda *args, **facts: Result)
    monkeypatch.setattr(evaluate, "write_summary", note)
    data = write_data(tmp_path, {1: "person", 17: "cat", 18: "dog"})
    program = programs(model, detectors[model], tmp_path)["evaluate"]
    program(f"--data={data}", "--no-analysis")
    program(f"--data={data}", "--no-analysis", "--name=Mine")
    assert names == [small_recipe(model).name, "Mine"]


@pytest.mark.parametrize("name", ["gn", "nogn", "tricks"])
def test_finetuning_takes_the_head_of_a_published_fcos(name, network_of, tmp_path):
    """Whatever the requested preset is: by the tensors that the head's towers have."""
    published = module("fcos", "config").RECIPES[name]
    small = replace(published, backbone="resnet14", channels=32, tower_convs=1)
    network = module("fcos", "model").build_model(small, 80)
    file = tmp_path / "epoch_12.pth"
    checkpoint.save(file, {"state_dict": network.state_dict(), "meta": {}})
    train = programs("fcos", file, tmp_path)["train"]
    flags = ("--backbone=resnet14", "--channels=32", "--tower_convs=1")
    for requested in ("gn", "nogn", "tricks"):
        recipe = network_of("fcos", train, f"--recipe={requested}", *flags)
        for field in ("head_norm", "conv_bias", "norm_on_bbox", "centerness_on_reg", "mean"):
            assert getattr(recipe, field) == getattr(published, field), (requested, field)


# ---- files that do not say their network


# The flags that give the network of weights alone; ssd_mmdet's show it themselves.
NETWORK_FLAGS = {
    "ssd_resnet34": ["--recipe=quickstart"],
    "m2det": ["--recipe=quickstart"],
    "fcos": ["--recipe=quickstart", "--channels=32", "--tower_convs=1"],
    TFRECORD: ["--recipe=small", "--category_ids=1,17,18"],
}


def recipe_of_flags(model):
    if model == "m2det":  # its other changes have no flags
        return module(model, "config").RECIPES["quickstart"]
    if model == TFRECORD:
        return replace(small_recipe(model), category_ids=(1, 17, 18))
    return small_recipe(model)


@pytest.fixture(scope="module")
def bare_detectors(tmp_path_factory):
    """`bare_detectors[model]`: weights alone, of the network that the flags above give."""
    folder = tmp_path_factory.mktemp("bare_detectors")
    paths = {}
    for model in NETWORK_FLAGS:
        network = module(model, "model").build_model(recipe_of_flags(model), 3)
        paths[model] = folder / f"{model.replace('/', '_')}.pth"
        checkpoint.save(paths[model], {"model": network.state_dict()})
    return paths


@pytest.mark.parametrize("model", ["ssd_resnet34", "m2det", "fcos"])
def test_weights_are_exported_with_the_flags_of_their_network(model, bare_detectors, tmp_path):
    out = tmp_path / "out.pth"
    main = module(model, "weights").main
    main(["export", str(bare_detectors[model]), str(out), *NETWORK_FLAGS[model]])
    weights = tensors_of_checkpoint(checkpoint.load(bare_detectors[model]))
    exported = tensors_of_checkpoint(checkpoint.load(out))
    assert exported.keys() == weights.keys()
    assert all(torch.equal(value, exported[key]) for key, value in weights.items())


@pytest.mark.parametrize("model", MODELS)
def test_an_export_refuses_a_flag_that_the_checkpoint_contradicts(model, detectors, tmp_path):
    flag, words = CONTRADICTION[model]
    main = module(model, "weights").main
    with pytest.raises(UserError) as error:
        main(["export", str(detectors[model]), str(tmp_path / "out.pth"), flag])
    assert str(error.value) == words.replace("FILE", str(detectors[model]))
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("model", ["ssd_resnet34", TFRECORD])
def test_onnx_is_exported_with_the_flags_of_the_network(
    model, bare_detectors, tmp_path, monkeypatch
):
    export = module(model, "pthtar2onnx")
    networks = []
    monkeypatch.setattr(export, "require_packages", lambda: None)

    def export_graph(network, *arguments):
        networks.append(network)
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export_graph", export_graph)
    with pytest.raises(KeyboardInterrupt):
        export.main([f"--checkpoint={bare_detectors[model]}", *NETWORK_FLAGS[model]])
    assert len(networks) == 1


@pytest.mark.parametrize("model", NETWORK_FLAGS)
def test_a_users_program_may_give_the_recipe_of_the_network(model, bare_detectors):
    load_detector = module(model, "detector").Detector.load
    recipe = recipe_of_flags(model)
    detector = load_detector(bare_detectors[model], "cpu", recipe)
    assert detector.report.missing == detector.report.unknown == ()
    assert detector.recipe.backbone == recipe.backbone
    with pytest.raises(UserError, match=r"its weights are not this network's"):
        load_detector(bare_detectors[model], "cpu")


def test_what_a_published_fcos_cannot_say_is_given_with_its_recipe(network_of, tmp_path):
    """Whether distances are in strides shows in no tensor of the head."""
    published = module("fcos", "config").RECIPES["nogn"]
    small = replace(published, backbone="resnet14", channels=32, tower_convs=1)
    network = module("fcos", "model").build_model(small, 80)
    file = tmp_path / "epoch_12.pth"
    checkpoint.save(file, {"state_dict": network.state_dict(), "meta": {}})
    train = programs("fcos", file, tmp_path)["train"]
    words = ("--backbone=resnet14", "--channels=32", "--tower_convs=1", "--norm_on_bbox")
    with pytest.raises(UserError) as error:
        train(*words)
    assert str(error.value) == (
        f"--norm_on_bbox True: {file} does not say its recipe; its tensors look like those with "
        "False; omit it, or give the --recipe of this network with it"
    )
    recipe = network_of("fcos", train, "--recipe=nogn", *words)
    assert (recipe.head_norm, recipe.norm_on_bbox) == ("none", True)


# ---- only class heads may differ


def load(model, state, classes=3, recipe=None):
    """The report of loading a state dict into a new network of the small recipe."""
    torch.manual_seed(1)
    network = module(model, "model").build_model(recipe or small_recipe(model), classes)
    return module(model, "weights").load_weights(network, state)


def tensors_of(detectors, model):
    return dict(checkpoint.load(detectors[model])["model"])


@pytest.mark.parametrize("model", ALL)
def test_a_detector_lacks_no_weight_and_has_no_other(model, detectors):
    weights = tensors_of(detectors, model)
    report = load(model, {"model": weights, "recipe": asdict(small_recipe(model))})
    assert report.missing == report.unknown == report.reinitialised == ()
    name = next(key for key in weights if key.endswith("bias"))
    without = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(UserError, match=f"not this network's: 1 missing: {re.escape(name)}; give"):
        load(model, {"model": without, "recipe": asdict(small_recipe(model))})
    more = {**weights, "another.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"not this network's: 1 unknown: another\.weight; give"):
        load(model, {"model": more, "recipe": asdict(small_recipe(model))})


@pytest.mark.parametrize("model", ALL)
def test_what_no_network_reads_is_no_difference(model, detectors):
    weights = {}
    for key, value in tensors_of(detectors, model).items():
        if not key.endswith("num_batches_tracked"):
            weights[key] = value
    extra = ("a.total_ops", "total_params", "n_averaged", "data_preprocessor.mean", "ema_a_weight")
    weights |= {key: torch.zeros(1) for key in extra}
    report = load(model, {"model": weights, "recipe": asdict(small_recipe(model))})
    assert report.require_complete("f.pt") is report


@pytest.mark.parametrize(
    ("model", "bad"), list(zip(ALL, ("nan", "inf", "-inf", "nan", "inf"), strict=True))
)
def test_weights_that_are_not_finite_are_refused_by_every_program(model, bad, detectors, tmp_path):
    state = checkpoint.load(detectors[model])
    weights = dict(state["model"])
    name = list(weights)[-1]
    weights[name] = torch.full_like(weights[name], float(bad))
    file = tmp_path / "iter_1.pt"
    checkpoint.save(file, {**state, "model": weights})
    reading = programs(model, file, tmp_path)
    names = set(reading) - {"resume"}
    if model == TFRECORD:
        names.remove("train")  # which reads records first
        with pytest.raises(UserError, match="has values that are not finite numbers"):
            load(model, checkpoint.load(file))
    for program in sorted(names):
        with pytest.raises(UserError) as error:
            reading[program]()
        assert str(error.value) == (
            f"{file}: {name} has values that are not finite numbers; "
            "the training that wrote it had diverged; give an earlier checkpoint"
        )
    assert not (tmp_path / "out").exists()


NO_NUMBERS = {
    "of the dtype int64": lambda value: value.long(),
    "of the dtype bool": lambda value: value.bool(),
    "of the dtype complex64": lambda value: value.to(torch.complex64),
    "of the dtype float8_e4m3fn": lambda value: value.to(torch.float8_e4m3fn),
    "of the dtype quint8": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.quint8),
    "of the layout sparse_coo": lambda value: value.to_sparse(),
    "on the device meta, without values": lambda value: value.to("meta"),
}


@pytest.mark.parametrize("model", ALL)
def test_weights_that_are_no_real_numbers_are_refused(model, detectors):
    """Of a class head, of the backbone, and with `classes`, where heads are copied by rows."""
    state = checkpoint.load(detectors[model])
    weights = state["model"]
    head = next(key for key in weights if module(model, "weights").LAYOUT.class_head.fullmatch(key))
    for name in (next(iter(weights)), head):
        for words, change in NO_NUMBERS.items():
            changed = {**state, "model": {**weights, name: change(weights[name])}}
            network = module(model, "model").build_model(small_recipe(model), 3)
            with pytest.raises(UserError) as error:
                module(model, "weights").load_weights(network, changed, ("a", "b", "c"))
            assert str(error.value) == (
                f"{detectors[model]}: {name} is {words}, not of floating-point numbers; "
                "save its weights as float32"
            )


@pytest.mark.parametrize("model", ALL)
def test_what_no_network_reads_may_be_anything(model, detectors):
    weights = tensors_of(detectors, model)
    weights["ema_a_weight"] = torch.tensor(float("nan"))
    weights["a.total_ops"] = torch.tensor(float("inf"))
    report = load(model, {"model": weights, "recipe": asdict(small_recipe(model))})
    assert report.require_complete("f.pt") is report


HEADS = {
    "ssd_mmdet": "bbox_head.cls_convs.0.bias",
    "ssd_resnet34": "mbox.0.weight",
    "m2det": "conf.0.bias",
    "fcos": "bbox_head.conv_cls.weight",
    TFRECORD: "class_net.0.weight",
}


@pytest.mark.parametrize("model", ALL)
def test_a_head_without_a_class_is_named(model, detectors):
    weights = tensors_of(detectors, model)
    num_classes_of = module(model, "weights").num_classes_of
    heads = [HEADS[model], "loc.0.bias"] if model == "m2det" else [HEADS[model]]
    for head in heads:
        empty = {**weights, head: torch.zeros(0)}
        with pytest.raises(UserError, match=rf"^the state dict: {re.escape(head)} has 0 rows, few"):
            num_classes_of(empty)
        number = {**weights, head: torch.tensor(1.0)}
        with pytest.raises(UserError, match=rf"^the state dict: {re.escape(head)} is a single nu"):
            num_classes_of(number)


@pytest.mark.parametrize("model", ALL)
def test_a_tensor_needs_a_name_of_its_own(model, detectors):
    weights = tensors_of(detectors, model)
    name = next(iter(weights))
    network_keys = module(model, "weights").network_keys
    deep = {f"module.module.{key}": value for key, value in weights.items()}
    assert network_keys({"model": deep}).keys() == weights.keys()
    with pytest.raises(UserError, match=r"^f\.pt: a tensor has the key 7, which is not a name; "):
        network_keys({"model": {**weights, 7: torch.zeros(1)}, "path": "f.pt"})
    twice = {**weights, f"module.{name}": weights[name]}
    line = f"^f\\.pt: {name} and module\\.{name} are the same weight; remove one of them"
    with pytest.raises(UserError, match=line):
        network_keys({"model": twice, "path": "f.pt"})


def test_a_wrapper_holds_tensors(detectors):
    """In front of the weights MMDetection's configuration lies under `model`."""
    weights = tensors_of(detectors, "ssd_mmdet")
    state = {"model": {"type": "SSD"}, "net": {"ema": {}}, "state_dict": {"module": weights}}
    assert tensors_of_checkpoint(state).keys() == weights.keys()


# ---- entries that are not as ours


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("recipe", ["yolo", {"lr": 0.1}, ["a"], 3])
def test_a_recipe_of_another_project_is_none(model, recipe, detectors):
    weights = module(model, "weights")
    requested = small_recipe(model)
    state = {"model": tensors_of(detectors, model), "path": "f.pt"}
    expected = weights.recipe_of_checkpoint(requested, state)
    assert weights.recipe_of_checkpoint(requested, {**state, "recipe": recipe}) == expected
    if model == "fcos":
        assert weights.mean_of({**state, "recipe": recipe}) is None


@pytest.mark.parametrize("model", ALL)
def test_a_value_of_another_type_in_a_recipe_is_named(model, detectors):
    weights = module(model, "weights")
    state = checkpoint.load(detectors[model])
    for field in weights.NETWORK:
        changed = {**state, "recipe": {**state["recipe"], field: None}}
        with pytest.raises(UserError) as error:
            weights.recipe_of_checkpoint(small_recipe(model), changed)
        assert str(error.value) == (
            f"{detectors[model]}: its recipe has {field} = None; "
            "give a checkpoint as train.py wrote it"
        )


def test_the_check_of_batch_norm_knows_our_files_and_no_others(detectors, tmp_path):
    """One that we trained with batch norm, exported; and another project's with a `recipe`."""
    state = checkpoint.load(detectors["fcos"])
    weights = state["model"]
    for key, value in weights.items():
        if key.startswith("backbone.") and key.endswith("running_mean"):
            weights[key] = value + 0.1
    with pytest.raises(UserError, match="not a caffe ResNet-50"):
        load("fcos", {"state_dict": weights, "recipe": "r50"})
    file = tmp_path / "iter_1.pt"
    checkpoint.save(file, state)
    for layout in ("mmdet2", "mmdet3"):
        out = tmp_path / f"{layout}.pth"
        module("fcos", "weights").main(["export", str(file), str(out), f"--layout={layout}"])
        report = load("fcos", checkpoint.load(out))
        assert report.require_complete("f.pt") is report


def test_an_exported_detector_shows_its_width(detectors, tmp_path):
    out = tmp_path / "ssd512.pth"
    weights = module("ssd_mmdet", "weights")
    weights.main(["export", str(detectors["ssd_mmdet"]), str(out)])
    recipe = weights.recipe_of_checkpoint(small_recipe("ssd_mmdet"), checkpoint.load(out))
    assert recipe.width == 1 / 16
    report = load("ssd_mmdet", checkpoint.load(out), recipe=recipe)
    assert report.require_complete("f.pt") is report


@pytest.mark.parametrize("model", MODELS)
def test_an_export_never_destroys_what_it_reads(model, detectors, tmp_path, capsys):
    file = detectors[model]
    before = file.read_bytes()
    link = tmp_path / "link.pt"
    link.symlink_to(file)
    main = module(model, "weights").main
    for out in (file, link):
        with pytest.raises(UserError) as error:
            main(["export", str(file), str(out)])
        assert str(error.value) == (f"{out}: is the checkpoint that is read; give OUT another name")
    assert file.read_bytes() == before
    out = tmp_path / "out.pth"
    main(["export", str(file), str(out)])
    assert "in place of a former file" not in capsys.readouterr().out
    main(["export", str(file), str(out)])
    assert capsys.readouterr().out.endswith(", in place of a former file\n")


def test_efficientdet_is_not_called_the_tfrecord_recipe():
    names = ["class_net.conv_rep.0.conv_dw.weight", "box_net.predict.conv_pw.weight"]
    assert model_of({}, names) == ""
    assert model_of({}, ["class_net.0.weight"]) == TFRECORD


# ---- files of others


def zeros_of(name):
    """The state dict of one of torchvision's backbones, all zeros."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        state = getattr(models, name)(weights=None).state_dict()
    return {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}


@pytest.mark.parametrize(
    ("model", "preset", "name", "words"),
    [
        (
            "ssd_resnet34",
            "1p",
            "resnet50",
            "it is a ResNet-50; its weights are not this network's: ",
        ),
        (
            "ssd_resnet34",
            "1p",
            "resnet18",
            "it is a ResNet-18; its weights are not this network's: ",
        ),
        (
            "ssd_mmdet",
            "1p",
            "vgg16_bn",
            "it is a VGG with batch normalisation; its weights are not",
        ),
        (
            "ssd_mmdet",
            "1p",
            "vgg16",
            "it is torchvision's VGG; its weights are not this network's: 4 m",
        ),
        ("m2det", "512_vgg", "vgg16", "it is torchvision's VGG; no tensor fits this network"),
        ("m2det", "512_vgg", "resnet50", "it is a ResNet-50; no tensor fits this network"),
        ("fcos", "gn", "resnet50", "not a caffe ResNet-50"),
        (TFRECORD, "port", "resnet50", "it is a ResNet-50; its weights are not this network's: "),
    ],
)
def test_a_backbone_that_does_not_fit_whole_is_named(model, preset, name, words):
    state = {**zeros_of(name), "path": "file.pth"}
    recipe = module(model, "config").RECIPES[preset]
    with torch.device("meta"):
        network = module(model, "model").build_model(recipe, 80)
    with pytest.raises(UserError, match=rf"^file\.pth: {words}"):
        module(model, "weights").load_weights(network, state)


@pytest.mark.parametrize(
    ("model", "preset", "name"),
    [("ssd_mmdet", "1p", "ssd300_vgg16"), ("fcos", "gn", "fcos_resnet50_fpn")],
)
def test_torchvisions_detectors_are_named(model, preset, name):
    """`ssd300_vgg16` shares some names with MMDetection's SSD."""
    detection = pytest.importorskip("torchvision.models.detection")
    state = getattr(detection, name)(weights=None, weights_backbone=None).state_dict()
    recipe = module(model, "config").RECIPES[preset]
    with torch.device("meta"):
        network = module(model, "model").build_model(recipe, 80)
    with pytest.raises(UserError, match=r"^f\.pth: .*torchvision"):
        module(model, "weights").load_weights(network, {**state, "path": "f.pth"})
    with pytest.raises(UserError, match=r"^f\.pth: it is .*torchvision.*; no detection heads \("):
        module(model, "weights").num_classes_of({**state, "path": "f.pth"})


def test_a_detector_of_a_torchvision_style_resnet_is_not_fcos(detectors):
    """Its names and shapes are the same: only the statistics of its batch norm show it."""
    weights = tensors_of(detectors, "fcos")
    load("fcos", {"state_dict": weights})
    for key, value in weights.items():
        if key.startswith("backbone.") and key.endswith("running_mean"):
            weights[key] = value + 0.1
    with pytest.raises(UserError, match=r"^f\.pth: not a caffe ResNet-50 or ResNet-101 \(its"):
        load("fcos", {"state_dict": weights, "path": "f.pth"})
    # Ours may have trained it.
    load("fcos", {"model": weights, "recipe": asdict(small_recipe("fcos"))})


def test_a_deeper_backbone_is_not_cut_off(detectors):
    weights = tensors_of(detectors, "fcos")
    weights["backbone.layer3.5.conv1.weight"] = torch.zeros(256, 1024, 1, 1)
    with pytest.raises(UserError, match=r"1 unknown: backbone\.layer3\.5\.conv1\.weight"):
        load("fcos", {"state_dict": weights})
    backbone = {}
    for key, value in weights.items():
        if key.startswith("backbone."):
            backbone[key.removeprefix("backbone.")] = value
    with pytest.raises(UserError, match=r"1 unknown: backbone\.layer3\.5\.conv1\.weight"):
        load("fcos", backbone)


@pytest.mark.parametrize(
    ("wrappers", "prefix"),
    [
        (("model_state_dict",), "_orig_mod."),
        (("net",), "module."),
        (("weights",), "module._orig_mod."),
        (("ema",), ""),
        (("ema", "module"), ""),
        (("state_dict",), "_orig_mod.module."),
    ],
)
def test_nests_are_understood(wrappers, prefix, detectors):
    weights = tensors_of(detectors, "ssd_mmdet")
    state = {prefix + key: value for key, value in weights.items()}
    for wrapper in reversed(wrappers):
        state = {wrapper: state, "epoch": 3}
    assert tensors_of_checkpoint(state).keys() == weights.keys()
    report = load("ssd_mmdet", {**state, "recipe": asdict(small_recipe("ssd_mmdet"))})
    assert report.require_complete("f.pt") is report


@pytest.mark.parametrize("model", ALL)
def test_a_file_without_detection_heads_is_named_with_its_tensors(model):
    state = {"state_dict": {"a.weight": torch.zeros(1), "b": torch.zeros(1)}, "path": "f.pth"}
    line = "f.pth: no detection heads (2 tensors: a.weight, b); give a trained detector"
    with pytest.raises(UserError, match=re.escape(line)):
        module(model, "weights").num_classes_of(state)
    state = {"network": {"a.weight": torch.zeros(1)}, "epoch": 3, "path": "f.pth"}
    line = "f.pth: no detection heads (no tensors; entries: network, epoch); give a trained"
    with pytest.raises(UserError, match=re.escape(line)):
        module(model, "weights").num_classes_of(state)


# ---- class names


@pytest.mark.parametrize("model", ALL)
def test_a_file_names_as_many_classes_as_its_heads_have(model, detectors, tmp_path):
    file = tmp_path / "iter_1.pt"
    state = {**checkpoint.load(detectors[model]), "classes": ["person", "cat"]}
    checkpoint.save(file, state)
    line = f"{file} names 2 classes, its heads have 3 classes; correct the names in the file, or"
    reading = programs(model, file, tmp_path)
    for name in sorted(set(reading) - {"resume", "train"}):
        with pytest.raises(UserError, match=f"^{re.escape(line)}"):
            reading[name]()
    network = module(model, "model").build_model(small_recipe(model), 3)
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        module(model, "weights").load_weights(network, checkpoint.load(file), ("person", "cat"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", MODELS)
def test_class_names_that_are_assumed_are_said(model, tmp_path, monkeypatch, capsys):
    """COCO's where the val set does not have 80 classes of its own; by demo and export too."""
    network = module(model, "model").build_model(small_recipe(model), 80)
    file = tmp_path / "iter_1.pt"
    state = run_state(model, network.state_dict())
    del state["classes"]
    checkpoint.save(file, state)
    read = []

    def note(network, recipe, records, *args):
        read.append(records.class_names)

    monkeypatch.setattr(module(model, "evaluate"), "detect_all", note)
    reading = programs(model, file, tmp_path)
    own = {ident: f"name {ident}" for ident in range(1, 81)}
    for folder, categories in (("own", own), ("coco", {1: "person", 10: "traffic light"})):
        (tmp_path / folder).mkdir()
        reading["evaluate"](f"--data={write_data(tmp_path / folder, categories)}")
    assert read == [tuple(own.values()), COCO_CLASSES]
    reading["demo"](f"--show_dir={tmp_path}/drawn", str(tmp_path / "own/val2017"))
    lines = capsys.readouterr().out.splitlines()
    line = f"{file}: its class names are not in the file; assumed: "
    assert line + "name 1, name 2, name 3 and 77 more" in lines
    assert lines.count(line + "COCO's (person, bicycle, car and 77 more)") == 2
    if model in ("fcos", "ssd_mmdet"):  # whose originals' files have class names
        reading["weights"]()
        assert line + "COCO's (person, bicycle, car and 77 more)" in capsys.readouterr().out


@pytest.mark.parametrize("model", ALL)
def test_training_says_which_class_names_it_assumes(model, detectors):
    state = {"model": tensors_of(detectors, model), "recipe": asdict(small_recipe(model))}
    network = module(model, "model").build_model(small_recipe(model), 3)
    load_weights = module(model, "weights").load_weights
    report = load_weights(network, state, ("a", "b", "c"))
    line = "its class names are not in the file, the data's are assumed in their order"
    assert str(report).endswith(f" tensors loaded; {line}")
    report = load_weights(network, {**state, "classes": ["a", "b", "c"]}, ("a", "b", "c"))
    assert str(report).endswith(" tensors loaded")


def test_a_tfrecord_detector_without_names_needs_as_many_category_ids(detectors):
    state = {"model": tensors_of(detectors, TFRECORD), "path": "iter_1.pt"}
    load = module(TFRECORD, "detector").Detector.from_checkpoint
    recipe = small_recipe(TFRECORD)
    with pytest.raises(
        UserError, match=r"^iter_1\.pt: does not name its 3 classes, and --category"
    ):
        load(state, recipe, torch.device("cpu"))
    detector = load(state, replace(recipe, category_ids=(1, 5, 7)), torch.device("cpu"))
    assert detector.class_names == ("1", "5", "7")


@pytest.mark.parametrize("ids", [[1, 17], "person", [1, 17, "dog"]])
def test_a_file_has_as_many_category_ids_as_its_heads_have_classes(ids, detectors):
    state = {**checkpoint.load(detectors[TFRECORD]), "category_ids": ids, "path": "iter_1.pt"}
    line = "^iter_1.pt: category_ids is .*, not a list of integers; correct the entry"
    if len(ids) == 2:
        line = "^iter_1.pt names 2 category ids, its heads have 3 classes; correct the names"
    with pytest.raises(UserError, match=line):
        module(TFRECORD, "weights").recipe_of_checkpoint(small_recipe(TFRECORD), state)


META = (
    {"CLASSES": ("a", "b c", "d")},
    {"dataset_meta": {"classes": ["a", "b c", "d"]}},
    {"dataset_meta": {"CLASSES": ("a", "b c", "d")}},
)


@pytest.mark.parametrize("meta", META)
@pytest.mark.parametrize("model", ["ssd_mmdet", "fcos"])
def test_mmdetections_class_names(model, meta, detectors):
    state = {"state_dict": tensors_of(detectors, model), "meta": meta}
    assert module(model, "weights").class_names_of(state) == ("a", "b c", "d")


@pytest.mark.parametrize("model", ["ssd_mmdet", "fcos"])
@pytest.mark.parametrize("runner", ["mmcv", "mmengine"])
def test_files_of_mmdetections_runners(model, runner, detectors, tmp_path, foreign, monkeypatch):
    """With their objects inside, whose classes are not there when the file is read."""
    names = ("person", "traffic light", "dog")
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    state = {"state_dict": OrderedDict(tensors_of(detectors, model)), "optimizer": optimizer}
    if runner == "mmcv":
        state["meta"] = {"epoch": 12, "iter": 9, "mmdet_version": "2.11.0", "CLASSES": names}
        state["meta"]["config"] = foreign.Config()
    else:
        state["meta"] = {"epoch": 12, "cfg": "model = dict()", "seed": 1, "mmengine_version": "1"}
        state["meta"]["dataset_meta"] = foreign.ConfigDict(classes=names, palette=[(220, 20, 60)])
        scalars = OrderedDict({"train/loss": foreign.HistoryBuffer()})
        state["message_hub"] = {"log_scalars": scalars, "runtime_info": {}, "resumed_keys": {}}
    file = tmp_path / "epoch_12.pth"
    torch.save(state, file)
    monkeypatch.delitem(sys.modules, "mmlike")
    loaded = checkpoint.load(file)
    weights = module(model, "weights")
    assert weights.class_names_of(loaded) == names
    report = load(model, loaded)
    assert report.require_complete(str(file)) is report


def write_data(folder, categories):
    """Write a val set of one black image, with a box of each category; return its folder."""
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    Image.new("RGB", (100, 80)).save(folder / "val2017/1.jpg")
    image = {"id": 1, "file_name": "1.jpg", "height": 80, "width": 100}
    boxes = []
    for ident in categories:
        box = {"id": ident, "image_id": 1, "category_id": ident, "iscrowd": 0}
        boxes.append({**box, "bbox": [5, 5, 40, 40], "area": 1600})
    names = [{"id": ident, "name": name} for ident, name in categories.items()]
    content = {"images": [image], "annotations": boxes, "categories": names}
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("model", ["ssd_mmdet", "fcos"])
def test_a_class_name_may_have_an_underscore_for_a_space(model, detectors, tmp_path, monkeypatch):
    """As in MMDetection until April 2020; `traffic light` is a category of the data."""
    file = tmp_path / "epoch_24.pth"
    state = checkpoint.load(detectors[model])
    named = {"classes": ["person", "traffic_light", "dog"]}
    checkpoint.save(file, {**state, **named})
    categories = []

    def note(network, recipe, records, *args):
        categories.append((records.class_names, records.category_ids))

    monkeypatch.setattr(module(model, "evaluate"), "detect_all", note)
    data = write_data(tmp_path, {1: "person", 10: "traffic light", 18: "dog"})
    programs(model, file, tmp_path)["evaluate"](f"--data={data}")
    assert categories == [(("person", "traffic light", "dog"), (1, 10, 18))]
    torch.manual_seed(2)
    network = module(model, "model").build_model(small_recipe(model), 2)
    state = checkpoint.load(file)
    report = module(model, "weights").load_weights(network, state, ("traffic light", "cow"))
    assert "1 classes of the same name keep their weights: traffic light" in str(report)
    assert "1 dropped" not in str(report)
