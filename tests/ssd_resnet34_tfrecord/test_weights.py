"""Loading weights of every kind, and refusing what does not fit."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from common.errors import UserError
from ssd_resnet34 import config as first_config
from ssd_resnet34 import model as first_model
from ssd_resnet34 import weights as first_weights
from ssd_resnet34.tfrecord import weights
from ssd_resnet34.tfrecord.bundle import Bundle
from ssd_resnet34.tfrecord.config import RECIPES
from ssd_resnet34.tfrecord.model import build_model
from ssd_resnet34.tfrecord.weights import (
    load_weights,
    published_state_dict,
    tensorflow_names,
    trained_classes,
)
from tests.golden.fill import fill_value


class FakeBundle:
    """A TensorFlow checkpoint in memory."""

    def __init__(self, variables):
        self.variables = variables
        self.names = tuple(variables)

    def read(self, name):
        return self.variables[name]


@pytest.fixture
def variables(golden):
    """Every variable of the whole model under TensorFlow's name and in its layout."""

    def value(entry):
        array = fill_value(entry["fill_key"], tuple(entry["torch_shape"]))
        return torch.from_numpy(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array)

    return {entry["tf_name"]: value(entry) for entry in golden("mapping")}


@pytest.fixture
def load_variables(monkeypatch, recipe):
    """`load_variables(variables)`: a network with them loaded, and the report."""
    model = build_model(recipe, 80)

    def load(variables):
        monkeypatch.setattr(weights, "find_prefix", str)
        monkeypatch.setattr(weights, "Bundle", lambda prefix: FakeBundle(variables))
        return model, load_weights(model, "model.ckpt-1")

    return load


def check_filled(golden, model, prefix):
    names = {name: key for key, name in tensorflow_names(model).items()}
    state, checked = model.state_dict(), 0
    for entry in golden("mapping"):
        if entry["tf_name"].startswith(prefix):
            expected = fill_value(entry["fill_key"], tuple(entry["torch_shape"]))
            assert_array_equal(state[names[entry["checkpoint_name"]]], expected)
            checked += 1
    return checked


def test_golden_variables_under_our_keys_and_in_our_layout(golden, golden_dir, recipe):
    model = build_model(recipe, 80)
    bundle = Bundle(golden_dir / "checkpoint/model.ckpt-28152")
    state, foreign = weights.tensorflow_tensors(model, bundle)
    names = tensorflow_names(model)
    for key, value in state.items():
        entry = golden("checkpoint/expected")[names[key]]
        expected = fill_value(entry["torchvision_key"], tuple(entry["torch_shape"]))
        factor = np.float32(0.2 if entry["torchvision_key"].endswith("bn2.weight") else 1)
        assert_array_equal(value, expected * factor)
    assert len(foreign) == 3
    assert len(state) == len(bundle.names) - len(foreign)
    with pytest.raises(UserError, match=r"\d+ missing: conv2d_3/kernel.* more"):
        load_weights(model, golden_dir / "checkpoint")


def test_a_whole_tensorflow_detector(golden, variables, load_variables):
    variables["conv2d/kernel/Momentum"] = torch.zeros(1)
    model, report = load_variables(variables)
    assert check_filled(golden, model, "") == 189
    assert report.unknown == ("conv2d/kernel/Momentum",)
    assert report.missing == ()


def test_a_tensorflow_backbone(golden, variables, load_variables):
    backbone = {
        name.removeprefix("resnet34/"): value
        for name, value in variables.items()
        if name.startswith("resnet34/")
    }
    foreign = {"global_step": torch.tensor(28152), "dense/bias": torch.zeros(1001)}
    model, report = load_variables(backbone | foreign)
    assert check_filled(golden, model, "resnet34/") == len(backbone)
    assert report.unknown == ("dense/bias", "global_step")
    assert all(key.startswith(("additional", "class_net", "box_net")) for key in report.missing)
    assert len(report.missing) == 20 + 24


def test_a_misshapen_variable_is_named(variables, load_variables):
    variables["resnet34/conv2d_9/kernel"] = torch.zeros(3, 3, 64, 128)
    with pytest.raises(UserError, match="1 of another shape: conv2d_9/kernel"):
        load_variables(variables)


def test_torchvisions_file(tmp_path, recipe):
    torchvision = pytest.importorskip("torchvision")
    state = torchvision.models.resnet34().state_dict()
    torch.save(state, tmp_path / "resnet34.pth")
    model = build_model(recipe, 80)
    report = load_weights(model, tmp_path / "resnet34.pth")
    assert all(key.startswith(("layer4", "fc")) for key in report.unknown)
    loaded = model.model[5][2].conv1.weight
    assert torch.equal(loaded, state["layer3.2.conv1.weight"])


def test_our_own_checkpoint(tmp_path, recipe):
    source, model = build_model(recipe, 80), build_model(recipe, 80)
    torch.save({"model": published_state_dict(source)}, tmp_path / "ours.pth")
    report = load_weights(model, tmp_path / "ours.pth")
    assert report.unknown == report.missing == ()
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in source.state_dict().items())


def test_class_heads_of_another_count_start_anew(recipe):
    model = build_model(recipe, 80)
    before = published_state_dict(model)
    other = build_model(recipe, 20).state_dict()
    report = load_weights(model, other)
    assert len(report.reinitialised) == 12
    assert all(key.startswith("class_net.") for key in report.reinitialised)
    after = model.state_dict()
    assert torch.equal(after["class_net.0.weight"], before["class_net.0.weight"])
    assert torch.equal(after["box_net.0.weight"], other["box_net.0.weight"])
    with pytest.raises(UserError, match="give a detector trained on these classes"):
        report.require_complete("f.pt")


@torch.no_grad()
def test_classes_of_the_same_name_keep_their_weights():
    recipe = RECIPES["small"]
    torch.manual_seed(0)
    trained = build_model(recipe, 3).eval()
    network = build_model(recipe, 2).eval()
    state = {"model": trained.state_dict(), "classes": ["dog", "cat", "cow"], "path": "a.pt"}
    report = load_weights(network, state, ("cow", "hat"))
    assert "1 classes of the same name keep their weights: cow" in str(report)
    assert "1 initialised anew: hat" in str(report)
    images = torch.rand(1, 3, recipe.image_size, recipe.image_size)
    before = trained(images)[1]  # (1, background and classes, anchors)
    after = network(images)[1]
    torch.testing.assert_close(after[:, 1], before[:, 3])
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 2], before[:, 2])


def test_earlier_checkpoints_have_ids_in_the_place_of_names():
    state = {"classes": ["2", "40"], "category_ids": [2, 40]}
    assert trained_classes(state) is None
    assert trained_classes(state | {"classes": ["buoy", "boat"]}) == ("buoy", "boat")


def test_a_deeper_backbone_of_tensorflow_is_refused(variables, load_variables):
    variables["resnet34/conv2d_99/kernel"] = torch.zeros(3, 3, 64, 64)
    with pytest.raises(UserError, match="weights that are not of this network: resnet34/conv2d_99"):
        load_variables(variables)


def test_the_other_recipes_detector_is_refused(recipe):
    model = build_model(recipe, 80)
    other = first_model.build_model(first_config.RECIPES["1p"], 80)
    with pytest.raises(UserError, match="a detector of ssd_resnet34, not of ssd_resnet34/tfrecord"):
        load_weights(model, other.state_dict())
    with pytest.raises(UserError, match="a detector of ssd_resnet34/tfrecord, not of ssd_resnet34"):
        first_weights.load_weights(other, model.state_dict())


@pytest.mark.parametrize("words", [[], ["export", "a", "b"], ["--help"]])
def test_there_is_no_export_and_a_line_says_so(words):
    with pytest.raises(UserError, match="has no export: its original's form is a TensorFlow bund"):
        weights.main(words)
