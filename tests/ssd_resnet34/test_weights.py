import pickle
from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close

from common.errors import UserError
from ssd_resnet34.config import RECIPES
from ssd_resnet34.model import build_model
from ssd_resnet34.weights import load_weights, main, published_state_dict

RECIPE = RECIPES["1p"]


@pytest.fixture
def model():
    torch.manual_seed(1)
    return build_model(RECIPE, 80)


def torchvision_state(filled_state):
    """As resnet34-333f7ec4.pth: the trunk under torchvision's names, layer4 and fc, no counters."""
    names = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3"}
    state = {}
    for key, value in filled_state.items():
        package, position, rest = key.split(".", 2)
        if package == "model" and not rest.endswith("num_batches_tracked"):
            state[f"{names[position]}.{rest}"] = value
    state["layer4.0.conv1.weight"] = torch.zeros(512, 256, 3, 3)
    state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 512), torch.zeros(1000)
    return state


def assert_holds(model, expected, keys):
    state = model.state_dict()
    for key in keys:
        assert torch.equal(state[key], expected[key]), key


def test_torchvisions_backbone(model, filled_state, tmp_path):
    before = published_state_dict(model)
    torch.save(torchvision_state(filled_state), tmp_path / "resnet34.pth")
    report = load_weights(model, tmp_path / "resnet34.pth")
    trunk = {key for key in filled_state if key.startswith("model.")}
    counters = {key for key in trunk if key.endswith("num_batches_tracked")}
    assert set(report.loaded) == trunk - counters
    assert report.unknown == ("layer4.0.conv1.weight", "fc.weight", "fc.bias")
    assert report.reinitialised == ()
    assert set(report.missing) == set(filled_state) - trunk
    assert_holds(model, filled_state, report.loaded)
    assert_holds(model, before, report.missing)
    assert "num_batches_tracked" not in str(report)
    assert f"{len(report.loaded)} tensors loaded" in str(report)


def test_the_real_torchvision_names(model):
    """The names are torchvision's own, not just our idea of them."""
    resnet34 = pytest.importorskip("torchvision.models").resnet34
    theirs = resnet34().state_dict()
    report = load_weights(model, theirs)
    assert {key.split(".")[0] for key in report.unknown} == {"layer4", "fc"}
    assert all(not key.startswith("model.") for key in report.missing)
    assert_close(model.model[5][3].bn2.weight, theirs["layer3.3.bn2.weight"])
    assert torch.equal(
        model.model[4][0].downsample[0].weight, theirs["layer2.0.downsample.0.weight"]
    )


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_the_ports_checkpoint(model, filled_state, tmp_path, prefix, wrapper):
    state = {prefix + key: value for key, value in filled_state.items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "iter_1.pt")
    report = load_weights(model, tmp_path / "iter_1.pt")
    assert set(report.loaded) == set(filled_state)
    assert report.unknown == report.reinitialised == report.missing == ()
    assert_holds(model, filled_state, filled_state)


def test_our_checkpoint_with_everything_in_it(model, filled_state, tmp_path):
    state = {"model": filled_state, "optimizer": {"state": {}}, "classes": ["a"] * 80}
    torch.save(state, tmp_path / "iter_7.pt")
    load_weights(model, str(tmp_path / "iter_7.pt"))
    assert_holds(model, filled_state, filled_state)


def test_heads_of_another_class_count_start_anew_and_are_reported(filled_state):
    torch.manual_seed(2)
    model = build_model(RECIPE, 85)
    before = published_state_dict(model)
    report = load_weights(model, {"module." + key: value for key, value in filled_state.items()})
    heads = [key for key in filled_state if key.startswith("mbox.")]
    assert sorted(report.reinitialised) == sorted(heads)
    assert "12 re-initialised (another number of classes): mbox.0.weight" in str(report)
    assert_holds(model, before, heads)
    assert_holds(model, filled_state, set(filled_state) - set(heads))


def test_evaluation_demands_a_whole_detector(model, filled_state):
    whole = load_weights(model, {k: v for k, v in filled_state.items() if "num_batches" not in k})
    assert whole.require_complete("f.pth") is whole
    part = load_weights(model, {k: v for k, v in filled_state.items() if k.startswith("model.")})
    with pytest.raises(UserError, match=r"f\.pth: .* missing, left as initialised"):
        part.require_complete("f.pth")
    narrow = {}
    for key, value in filled_state.items():
        is_inner = key.startswith("model.") and value.ndim == 4 and value.shape[1] > 3
        narrow[key] = value[:1] if is_inner else value
    with pytest.raises(
        UserError, match=r"its weights are not this network's: \d+ of another shape"
    ):
        load_weights(model, narrow)


@pytest.mark.parametrize(
    "state",
    [{}, {"a": torch.zeros(3)}, {"model": {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)}}],
)
def test_nothing_that_fits(model, state, tmp_path):
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: no tensor fits this network"):
        load_weights(model, tmp_path / "other.pt")


def test_a_detector_of_the_tfrecord_recipe_is_refused(model):
    state = {"class_net.0.weight": torch.zeros(324, 256, 3, 3), "path": "tf.pt"}
    with pytest.raises(UserError) as error:
        load_weights(model, state)
    assert str(error.value) == (
        "tf.pt: a detector of ssd_resnet34/tfrecord, not of ssd_resnet34; "
        "give one of ssd_resnet34, or use the programs of ssd_resnet34/tfrecord"
    )


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [torch.save, lambda s, p: p.write_bytes(pickle.dumps(s, 2))])
def test_code_in_a_file_is_refused_and_not_run(model, filled_state, tmp_path, write):
    trace = tmp_path / "trace"
    write({"model": {"model.0.weight": torch.zeros(1)}, "x": Bomb(trace)}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"bomb\.pt"):
        load_weights(model, tmp_path / "bomb.pt")
    assert not trace.exists()


def test_published_state_dict_is_the_ports_layout_and_a_copy(model, golden, filled_state):
    model.to(memory_format=torch.channels_last)
    state = published_state_dict(model)
    assert [[key, list(value.shape)] for key, value in state.items()] == golden("keys")
    floats = [value for value in state.values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    assert {value.device.type for value in floats} == {"cpu"}
    kept = state["model.1.weight"].clone()
    with torch.no_grad():
        model.model[1].weight.add_(1)
    assert torch.equal(state["model.1.weight"], kept)


def test_an_exported_file_is_the_ports(golden, model, filled_state, tmp_path):
    """A dictionary with the single entry `model`; it loads here as well."""
    state = {"model": filled_state, "recipe": asdict(RECIPE), "classes": ["a"] * 80}
    torch.save(state, tmp_path / "best.pt")
    out = tmp_path / "iter_9.pt"
    main(["export", str(tmp_path / "best.pt"), str(out)])
    written = torch.load(out, weights_only=True)
    assert list(written) == ["model"]
    shapes = [[key, list(value.shape)] for key, value in written["model"].items()]
    assert shapes == golden("keys")
    load_weights(model, out).require_complete("iter_9.pt")
    assert_holds(model, filled_state, filled_state)


def test_what_is_no_detector_is_not_exported(filled_state, tmp_path):
    torch.save(torchvision_state(filled_state), tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match=r"resnet34\.pth: no detection heads \("):
        main(["export", str(tmp_path / "resnet34.pth"), str(tmp_path / "out.pt")])
    assert not (tmp_path / "out.pt").exists()
