from dataclasses import asdict, replace

import pytest
import torch

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from common.npu.weights import weights_on_cpu
from m2det.anchors import make_anchors
from m2det.config import RECIPES
from m2det.model import build_model
from m2det.weights import (
    class_names_of,
    load_weights,
    main,
    num_classes_of,
    published_state_dict,
    recipe_of_checkpoint,
)

SMALL = replace(RECIPES["320_vgg"], backbone="vgg16_thin", planes=16, num_levels=2)


def made(classes=80, seed=0, **fields):
    torch.manual_seed(seed)
    return build_model(replace(SMALL, **fields), classes)


@pytest.fixture
def model():
    return made(seed=1)


@pytest.fixture(scope="module")
def state():
    return published_state_dict(made())


def assert_holds(model, expected, keys):
    own = model.state_dict()
    for key in keys:
        assert torch.equal(own[key], expected[key]), key


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_a_published_checkpoint(model, state, tmp_path, prefix, wrapper):
    given = {prefix + key: value for key, value in state.items()}
    torch.save({wrapper: given} if wrapper else given, tmp_path / "m2det512_vgg.pth")
    report = load_weights(model, tmp_path / "m2det512_vgg.pth")
    assert set(report.loaded) == set(state)
    assert report.unknown == report.reinitialised == report.missing == ()
    assert_holds(model, state, state)


def test_vgg16_reducedfc(model, state):
    before = published_state_dict(model)
    given = {k.removeprefix("base."): v for k, v in state.items() if k.startswith("base.")}
    assert "31.weight" in given
    report = load_weights(model, given)
    assert set(report.loaded) == {f"base.{key}" for key in given}
    assert report.unknown == report.reinitialised == ()
    assert_holds(model, state, report.loaded)
    assert_holds(model, before, report.missing)


def test_torchvisions_resnet101():
    resnet101 = pytest.importorskip("torchvision.models").resnet101
    with torch.device("meta"):
        theirs = resnet101().state_dict()
    theirs = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in theirs.items()}
    model = made(backbone="resnet101")
    report = load_weights(model, theirs)
    assert len(report.loaded) == len(theirs)
    assert all(not key.startswith("base.") for key in report.missing)


@pytest.mark.parametrize("classes", [3, 81])
def test_with_another_class_count_the_class_heads_alone_start_anew(state, classes):
    model = made(classes, seed=2)
    before = published_state_dict(model)
    report = load_weights(model, {f"module.{key}": value for key, value in state.items()})
    heads = [f"conf.{k}.{part}" for k in range(6) for part in ("weight", "bias")]
    assert sorted(report.reinitialised) == sorted(heads)
    assert "12 re-initialised (another number of classes): conf.0.weight" in str(report)
    assert_holds(model, before, heads)
    assert_holds(model, state, set(state) - set(heads))


def test_evaluation_demands_a_whole_detector(model, state):
    whole = load_weights(model, {k: v for k, v in state.items() if "num_batches" not in k})
    assert whole.require_complete("f.pth") is whole
    part = load_weights(model, {k: v for k, v in state.items() if k.startswith("base.")})
    with pytest.raises(UserError, match=r"f\.pth: .* missing, left as initialised"):
        part.require_complete("f.pth")
    narrow = {k: v[:1] if v.ndim == 4 and v.shape[1] > 3 else v for k, v in state.items()}
    with pytest.raises(
        UserError, match=r"its weights are not this network's: \d+ of another shape"
    ):
        load_weights(model, narrow)


def test_the_names_show_whether_there_is_an_sfam(state):
    with_sfam = published_state_dict(made(seed=4, sfam=True))
    assert recipe_of_checkpoint(SMALL, with_sfam) == replace(SMALL, sfam=True)
    assert recipe_of_checkpoint(replace(SMALL, sfam=True), {"state_dict": state}) == SMALL
    backbone = {"0.weight": torch.zeros(3)}
    assert recipe_of_checkpoint(replace(SMALL, sfam=True), backbone).sfam
    with pytest.raises(UserError, match=r"24 missing: sfam_module\.fc1\.0\.weight"):
        load_weights(made(seed=3, sfam=True), state)
    with pytest.raises(UserError, match=r"24 unknown: sfam_module\.fc1\.0\.weight"):
        load_weights(made(seed=3), with_sfam)


def test_shared_modules_stay_shared(model, state):
    load_weights(model, state)
    with torch.no_grad():
        model.leach[0].conv.weight.add_(1)
    assert torch.equal(model.leach[1].conv.weight, model.leach[0].conv.weight)


@pytest.mark.parametrize(
    "given", [{}, {"a": torch.zeros(3)}, {"0.weight": torch.zeros(1, 3, 3, 3)}]
)
def test_nothing_that_fits(model, given, tmp_path):
    torch.save(given, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no tensor fits this network"):
        load_weights(model, tmp_path / "other.pth")


@pytest.mark.parametrize("classes", [1, 3, 80])
def test_classes_of_a_checkpoint(classes):
    state = published_state_dict(made(classes))
    assert num_classes_of({"state_dict": state}) == classes
    names = COCO_CLASSES if classes == 80 else tuple(f"class_{k}" for k in range(classes))
    assert class_names_of(state) == names
    assert class_names_of({"model": state, "classes": ["a"] * classes}) == ("a",) * classes


def test_a_file_without_detection_heads_is_named():
    with pytest.raises(UserError) as error:
        num_classes_of({"0.weight": torch.zeros(3), "path": "vgg.pth"})
    assert str(error.value) == (
        "vgg.pth: no detection heads (1 tensors: 0.weight); give a trained detector"
    )


def test_the_recipe_of_a_checkpoint_from_before_the_anchors_had_that_name():
    saved = {}
    for name, value in asdict(RECIPES["320_vgg"]).items():
        saved[name.replace("anchor_", "prior_")] = value
    assert "prior_maps" in saved
    recipe = recipe_of_checkpoint(RECIPES["512_vgg"], {"recipe": saved})
    assert recipe.anchor_maps == RECIPES["320_vgg"].anchor_maps
    assert torch.equal(make_anchors(recipe), make_anchors(RECIPES["320_vgg"]))


def test_given_buffers_stand_under_every_key_of_a_shared_module(model):
    """Means over ranks: the last key is what a loader is left with."""
    means = {"leach.0.bn.running_mean": torch.full((8,), 3.0), "Norm.running_var": torch.ones(32)}
    state = weights_on_cpu(model, means)
    for key in ("leach.0.bn.running_mean", "leach.1.bn.running_mean"):
        assert torch.equal(state[key], means["leach.0.bn.running_mean"])
    assert torch.equal(state["Norm.running_var"], torch.ones(32))
    load_weights(model, state)
    assert model.leach[0].bn.running_mean.eq(3).all()


def test_published_state_dict_is_a_copy_on_the_cpu(model):
    model.to(memory_format=torch.channels_last)
    state = published_state_dict(model)
    assert list(state) == list(model.state_dict())
    kept = state["reduce.conv.weight"].clone()
    with torch.no_grad():
        model.reduce.conv.weight.add_(1)
    assert torch.equal(state["reduce.conv.weight"], kept)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("sfam", [False, True])
def test_an_exported_file_is_the_originals(golden, tmp_path, sfam):
    """A bare state dict with its keys, all of them; it loads here as well."""
    model = made(5, num_levels=8, sfam=sfam)
    recipe = replace(SMALL, num_levels=8, sfam=sfam)
    state = {"model": model.state_dict(), "recipe": asdict(recipe), "classes": ["a"] * 5}
    torch.save(state, tmp_path / "best.pt")
    out = tmp_path / "m2det.pth"
    main(["export", str(tmp_path / "best.pt"), str(out)])
    written = torch.load(out, weights_only=True)
    keys = {key for key, _ in golden("keys")}
    if sfam:
        keys |= {key for key, _ in golden("keys_sfam")}
    assert set(written) == keys
    assert_holds(model, written, written)
    assert recipe_of_checkpoint(SMALL, written).sfam == sfam
    load_weights(model, out).require_complete("m2det.pth")
