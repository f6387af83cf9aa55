"""`--freeze` in the programs of all models."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.npu import checkpoint
from ssd_resnet34.tfrecord.loss import decay_term
from tests import scripts
from tests.small_models import MODELS, module
from tests.test_own_data import SHORT, SMALL

# The stages of the small backbones, and the first letters of the names of the first one's weights.
STAGES = {
    "ssd_mmdet": (6, ("backbone.features.0.", "backbone.features.2.")),
    "ssd_resnet34": (3, ("model.0.", "model.1.", "model.3.")),
    "m2det": (6, ("base.0.", "base.2.")),
    "fcos": (4, ("backbone.conv1.", "backbone.layer1.")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data"), train=4, val=2, classes=["person"])


def train(model, data, output, *flags):
    words = [*SMALL[model], *SHORT, f"--data={data}", f"--output_dir={output}", "--kind=perf"]
    module(model, "train").main([*words, *flags])


@pytest.mark.parametrize("model", MODELS)
def test_frozen_stages_stay_and_a_resumed_run_has_the_same(model, data, tmp_path):
    train(model, data, tmp_path / "one", "--max_iters=1")
    start = f"--checkpoint={tmp_path}/one/iter_1.pt"
    run = tmp_path / "run"
    train(model, data, run, start, "--freeze=1")
    stages, prefixes = STAGES[model]
    line = f"--freeze 1: 1 of {stages} stages of the backbone stay as they are, "
    assert line in (run / "train_0.log").read_text()
    before = checkpoint.load(tmp_path / "one/iter_1.pt")["model"]
    after = checkpoint.load(run / "iter_2.pt")["model"]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    kept = {name for name in after if name.startswith(prefixes)}
    assert kept
    assert not changed & kept
    assert changed
    resume = f"--resume={run}/iter_2.pt"
    with pytest.raises(UserError, match=r"frozen stages of the backbone \(1 before, 0 now\)"):
        train(model, data, run, resume, "--max_iters=3")
    train(model, data, run, resume, "--max_iters=3", "--freeze=1")


def test_the_whole_backbone_and_wrong_values(data, tmp_path):
    with pytest.raises(UserError, match="--freeze backbone: the weights of the backbone are rand"):
        train("ssd_resnet34", data, tmp_path / "run", "--freeze=backbone")
    with pytest.raises(UserError, match=r"--freeze 4: this backbone has 3 stages; give a number "):
        train("ssd_resnet34", data, tmp_path / "run", "--freeze=4")
    assert not (tmp_path / "run").exists()
    train("ssd_resnet34", data, tmp_path / "one", "--max_iters=1")
    start = f"--checkpoint={tmp_path}/one/iter_1.pt"
    train("ssd_resnet34", data, tmp_path / "run", start, "--freeze=backbone")
    before = checkpoint.load(tmp_path / "one/iter_1.pt")["model"]
    after = checkpoint.load(tmp_path / "run/iter_2.pt")["model"]
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("model."), name


def test_frozen_weights_are_not_in_the_printed_decay():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    frozen, trained = layers
    frozen.requires_grad_(False)
    expected = decay_term(trained.parameters(), 0.5)
    assert expected > 0
    assert decay_term(layers.parameters(), 0.5) == expected
