import pickle
from dataclasses import asdict, replace

import pytest
import torch

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from ssd_mmdet.config import RECIPES
from ssd_mmdet.model import build_model
from ssd_mmdet.weights import (
    class_names_of,
    load_weights,
    main,
    num_classes_of,
    published_state_dict,
)

THIN = replace(RECIPES["1p"], width=1 / 16)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return build_model(THIN, 80)


@pytest.fixture
def state():
    """Another network's weights, under the network's own keys."""
    torch.manual_seed(2)
    return published_state_dict(build_model(THIN, 80))


def assert_holds(model, expected, keys):
    own = model.state_dict()
    for key in keys:
        assert torch.equal(own[key], expected[key]), key


def since_2_14(key):
    """The spec's table, as MMDetection's own upgrade tool renames."""
    parts = key.split(".")
    if key == "backbone.l2_norm.weight":
        return "neck.l2_norm.weight"
    if parts[1] == "extra":
        position = int(parts[2])
        return f"neck.extra_layers.{position // 2}.{position % 2}.conv.{parts[3]}"
    if parts[0] == "bbox_head":
        return f"bbox_head.{parts[1]}.{parts[2]}.0.{parts[3]}"
    return key


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("rename", [str, since_2_14])
def test_mmdetections_checkpoints(model, state, tmp_path, prefix, wrapper, rename):
    given = {prefix + rename(key): value for key, value in state.items()}
    torch.save({wrapper: given} if wrapper else given, tmp_path / "epoch_1.pth")
    report = load_weights(model, tmp_path / "epoch_1.pth")
    assert set(report.loaded) == set(state)
    assert report.unknown == report.reinitialised == report.missing == ()
    assert_holds(model, state, state)


@pytest.mark.parametrize("name", ["1p", "ssd512"])
def test_published_state_dict_is_mmdetections_layout_and_a_copy(golden, name):
    with torch.device("meta"):
        keys = build_model(RECIPES[name], 80).state_dict()
    expected = golden({"1p": "keys.json", "ssd512": "ssd512_keys.json"}[name])
    assert [[key, list(value.shape)] for key, value in keys.items()] == expected

    model = build_model(replace(RECIPES[name], width=1 / 16), 80)
    model.to(memory_format=torch.channels_last)
    state = published_state_dict(model)
    assert list(state) == [key for key, _ in expected]
    later = published_state_dict(model, since_2_14=True)
    assert list(later) == [since_2_14(key) for key in state]
    for value, renamed in zip(state.values(), later.values(), strict=True):
        assert torch.equal(value, renamed)
        assert (value.dtype, value.device.type) == (torch.float32, "cpu")
    kept = state["backbone.l2_norm.weight"].clone()
    with torch.no_grad():
        model.backbone.l2_norm.weight.add_(1)
    assert torch.equal(state["backbone.l2_norm.weight"], kept)


@pytest.mark.parametrize("wrapper", ["state_dict", None])
def test_caffes_vgg16(model, state, tmp_path, wrapper):
    before = published_state_dict(model)
    trunk = [key for key in state if key.startswith("backbone.features.")]
    assert len(trunk) == 30
    given = {key.removeprefix("backbone."): state[key] for key in trunk}
    torch.save({wrapper: given} if wrapper else given, tmp_path / "vgg16_caffe.pth")
    report = load_weights(model, tmp_path / "vgg16_caffe.pth")
    assert sorted(report.loaded) == sorted(trunk)
    assert report.unknown == report.reinitialised == ()
    assert set(report.missing) == set(state) - set(trunk)
    assert_holds(model, state, trunk)
    assert_holds(model, before, report.missing)
    assert "30 tensors loaded" in str(report)


def test_our_checkpoint_with_everything_in_it(model, state, tmp_path):
    given = {"model": state, "optimizer": {"state": {}}, "iteration": 7, "classes": ["a"] * 80}
    torch.save(given, tmp_path / "iter_7.pt")
    load_weights(model, str(tmp_path / "iter_7.pt"))
    assert_holds(model, state, state)


def test_heads_of_another_class_count_start_anew_and_are_reported(state):
    torch.manual_seed(3)
    model = build_model(THIN, 5)
    before = published_state_dict(model)
    report = load_weights(model, {since_2_14(key): value for key, value in state.items()})
    heads = [key for key in state if key.startswith("bbox_head.cls_convs.")]
    assert sorted(report.reinitialised) == sorted(heads)
    assert "12 re-initialised (another number of classes): bbox_head.cls_convs.0.weight" in str(
        report
    )
    assert_holds(model, before, heads)
    assert_holds(model, state, set(state) - set(heads))


def test_evaluation_demands_a_whole_detector(model, state):
    whole = load_weights(model, {k: v for k, v in state.items() if "num_batches" not in k})
    assert whole.require_complete("f.pth") is whole
    part = load_weights(model, {k: v for k, v in state.items() if k.startswith("backbone.")})
    with pytest.raises(UserError, match=r"f\.pth: .* missing, left as initialised"):
        part.require_complete("f.pth")
    narrow = {k: v[:1] if v.ndim == 4 and v.shape[1] > 3 else v for k, v in state.items()}
    with pytest.raises(
        UserError, match=r"its weights are not this network's: \d+ of another shape"
    ):
        load_weights(model, narrow)


@pytest.mark.parametrize(
    "given",
    [{}, {"a": torch.zeros(3)}, {"model": {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)}}],
)
def test_nothing_that_fits(model, given, tmp_path):
    torch.save(given, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: no tensor fits this network"):
        load_weights(model, tmp_path / "other.pt")


def test_classes_of_a_checkpoint(state):
    assert num_classes_of(state) == 80
    assert num_classes_of({"state_dict": {since_2_14(k): v for k, v in state.items()}}) == 80
    names = tuple(f"name {label}" for label in range(80))
    assert class_names_of({"model": state, "classes": list(names)}) == names
    assert class_names_of({"state_dict": state, "meta": {"CLASSES": names}}) == names
    meta = {"dataset_meta": {"classes": names}}
    assert class_names_of({"state_dict": state, "meta": meta}) == names
    for unknown in (object(), {"CLASSES": object()}, {"dataset_meta": object()}):
        assert class_names_of({"state_dict": state, "meta": unknown}) == COCO_CLASSES
    assert class_names_of(state) == COCO_CLASSES
    few = published_state_dict(build_model(THIN, 3))
    assert class_names_of(few) == ("class_0", "class_1", "class_2")
    with pytest.raises(
        UserError, match=r"^vgg\.pth: no detection heads \(1 tensors: features\.0\.bias\); give"
    ):
        num_classes_of({"features.0.bias": torch.zeros(4), "path": "vgg.pth"})


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [torch.save, lambda s, p: p.write_bytes(pickle.dumps(s, 2))])
def test_code_in_a_file_is_refused_and_not_run(model, tmp_path, write):
    trace = tmp_path / "trace"
    given = {"model": {"backbone.l2_norm.weight": torch.zeros(1)}, "x": Bomb(trace)}
    write(given, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"bomb\.pt"):
        load_weights(model, tmp_path / "bomb.pt")
    assert not trace.exists()


def background_first(state):
    """A detector's tensors with the background as the first channel of each anchor shape."""
    moved = {}
    for key, value in state.items():
        if key.startswith("bbox_head.cls_convs."):
            channels = value.unflatten(0, (-1, 81))
            value = torch.cat([channels[:, 80:], channels[:, :80]], dim=1).flatten(0, 1)
        moved[key] = value
    return moved


def trained_like(state):
    """A detector's tensors with the largest bias for the background, as training makes it."""
    biased = {}
    for key, value in state.items():
        if key.startswith("bbox_head.cls_convs.") and key.endswith("bias"):
            value = value.clone()
            value.view(-1, 81)[:, 80] += 3
        biased[key] = value
    return biased


def test_mmdetection_1_has_the_background_first(model, state):
    state = trained_like(state)
    meta = {"mmdet_version": "1.2.0+abc", "CLASSES": COCO_CLASSES}
    report = load_weights(model, {"state_dict": background_first(state), "meta": meta})
    assert "background moved from the first place to the last" in str(report)
    assert_holds(model, state, state)


def test_published_files_of_march_2020_name_1_0_but_have_the_background_last(model, state):
    state = trained_like(state)
    meta = {"mmdet_version": "1.0rc1+5f9f470", "CLASSES": COCO_CLASSES}
    report = load_weights(model, {"state_dict": state, "meta": meta})
    assert "of MMDetection 1.0rc1+5f9f470, with the background last as in 2.x" in str(report)
    assert_holds(model, state, state)


def test_a_background_that_cannot_be_told_is_refused(model, state):
    biased = dict(state)
    for key, value in state.items():
        if key.startswith("bbox_head.cls_convs.") and key.endswith("bias"):
            biased[key] = value.clone()
            biased[key].view(-1, 81)[:, 5] += 3
    meta = {"mmdet_version": "1.2.0"}
    with pytest.raises(UserError, match=r"f\.pth: of MMDetection 1\.2\.0, and its biases do not"):
        load_weights(model, {"state_dict": biased, "meta": meta, "path": "f.pth"})
    # The version alone does not decide anything in files of 2.x and 3.x.
    for version in ("2.11.0", "3.3.0"):
        load_weights(model, {"state_dict": biased, "meta": {"mmdet_version": version}})


@pytest.mark.parametrize(("layout", "rename"), [("mmdet2", str), ("mmdet3", since_2_14)])
@pytest.mark.parametrize(("name", "keys"), [("1p", "keys.json"), ("ssd512", "ssd512_keys.json")])
def test_an_exported_file_is_mmdetections(golden, tmp_path, layout, rename, name, keys):
    """By its keys, all of them, in the golden order; it loads here as well."""
    torch.manual_seed(3)
    recipe = replace(RECIPES[name], width=1 / 16)
    weights = build_model(recipe, 2).state_dict()
    file = tmp_path / "best.pt"
    torch.save({"model": weights, "recipe": asdict(recipe), "classes": ["cat", "hat"]}, file)
    out = tmp_path / "ssd.pth"
    main(["export", str(file), str(out), f"--layout={layout}"])
    written = torch.load(out, weights_only=True)
    assert list(written["state_dict"]) == [rename(key) for key, _ in golden(keys)]
    assert written["meta"]["CLASSES"] == ("cat", "hat")
    has_dataset_meta = written["meta"].get("dataset_meta") == {"classes": ("cat", "hat")}
    assert has_dataset_meta == (layout == "mmdet3")
    for key, value in weights.items():
        assert torch.equal(written["state_dict"][rename(key)], value)
    again = build_model(recipe, 2)
    assert load_weights(again, out).require_complete("ssd.pth")
    assert_holds(again, weights, weights)


def test_an_exported_file_has_mmdetections_shapes(golden, filled_state, tmp_path):
    file = tmp_path / "iter_1.pt"
    torch.save({"model": filled_state}, file)
    main(["export", str(file), str(tmp_path / "ssd300.pth")])
    written = torch.load(tmp_path / "ssd300.pth", weights_only=True)
    shapes = [[key, list(value.shape)] for key, value in written["state_dict"].items()]
    assert shapes == golden("keys.json")
    assert written["meta"]["CLASSES"] == COCO_CLASSES
