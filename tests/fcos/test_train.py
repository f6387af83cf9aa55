"""What a run makes of the weights it is given."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.npu.distributed import Ranks
from common.npu.precision import Precision
from fcos import snapshot, train
from fcos.config import DETECTRON2_MEAN, DETECTRON_MEAN, RECIPES
from fcos.data import build_loader, training_records
from fcos.model import build_model

CPU = torch.device("cpu")
RECIPE = replace(RECIPES["gn"], backbone="resnet14", channels=64, tower_convs=1)


@pytest.fixture
def start(tiny_train):
    """A run of RECIPE with these weights, and what it logs."""
    records, said = training_records(tiny_train), []

    def run(recipe=RECIPE, resumed=None, weights=()):
        log = SimpleNamespace(info=said.append)
        where = (CPU, Ranks(), Precision(CPU), log, records, records)
        run = train.Training(train.parse([]), recipe, *where, resumed, weights)
        return run, "\n".join(said)

    return run


def caffe_file():
    torch.manual_seed(0)
    backbone = build_model(RECIPE, 3).backbone.state_dict()
    state = {key: value for key, value in backbone.items() if "num_batches" not in key}
    return {**state, "conv1.bias": torch.zeros(64), "path": "resnet14_msra.pth"}


def test_without_weights_everything_trains_and_a_line_says_so(start):
    run, said = start()
    assert not run.frozen
    assert all(p.requires_grad for p in run.model.parameters())
    assert "weights: random: nothing is frozen, batch norm trains" in said


def test_a_backbone_file_brings_its_mean_and_freezes(start):
    run, said = start(weights=[caffe_file()])
    assert (RECIPE.mean, run.recipe.mean) == (DETECTRON_MEAN, DETECTRON2_MEAN)
    assert run.frozen
    assert not run.model.backbone.layer1[0].conv2.weight.requires_grad
    assert not any(m.training for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert "resnet14_msra.pth: " in said
    assert "nothing is frozen" not in said
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.model.parameters() if p.requires_grad}


def test_a_resumed_run_and_finetuning_keep_the_mean(start):
    state = {**snapshot.take(start(weights=[caffe_file()])[0]), "path": "iter_0.pt"}
    # Its network is the state's: the recipe is given as the run was started.
    resumed, _ = start(resumed=state)
    assert resumed.frozen
    assert resumed.recipe.mean == DETECTRON2_MEAN
    finetuned, _ = start(weights=[state])
    assert finetuned.recipe.mean == DETECTRON2_MEAN


def test_a_step_has_the_rate_of_the_batch_and_twice_as_much_for_biases(start, tiny_train):
    recipe = replace(RECIPE, img_scale=("64,107",))
    run, _ = start(recipe)
    (batch,) = build_loader(recipe, training_records(tiny_train), True, end=1)
    run.step(batch)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == pytest.approx([0.00125 / 3, 0.0025 / 3])
    assert "base learning rate 0.00125" in run.plan()


def test_the_gradients_norm_before_clipping_is_logged(start, tiny_train):
    recipe = replace(RECIPE, img_scale=("64,107",), clip_norm=0.01)
    run, _ = start(recipe)
    (batch,) = build_loader(recipe, training_records(tiny_train), True, end=1)
    run.step(batch)
    grads = torch.cat([p.grad.flatten() for g in run.optimizer.param_groups for p in g["params"]])
    logged = run.window.fetch().means()["grad_norm"]
    assert grads.norm().item() == pytest.approx(0.01, rel=1e-3)  # clipped
    assert logged > 1


def test_a_skipped_overflow_is_no_reason_to_stop(start, tiny_train):
    recipe = replace(RECIPE, img_scale=("64,107",))
    run, _ = start(recipe)
    run.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    (batch,) = build_loader(recipe, training_records(tiny_train), True, end=1)
    run.step(batch)
    window = run.window.fetch()
    assert window.bad() is None
    assert window.means()["grad_norm"] == 0
    assert run.precision.scaler.get_scale() < 1e38
