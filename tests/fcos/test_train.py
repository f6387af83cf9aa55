"""What a run makes of the weights it is given."""

from dataclasses import replace

import pytest
import torch

from benchmarks.loop import TrainingLoop
from common.errors import UserError
from common.npu import checkpoint
from common.npu.precision import Precision
from fcos import train
from fcos.config import DETECTRON2_MEAN, DETECTRON_MEAN, RECIPES
from fcos.data import build_loader, training_records
from fcos.model import build_model
from tests.scripts import TINY

SMALL = {"backbone": "resnet14", "channels": 64, "tower_convs": 1, "img_scale": ("64,107",)}
RECIPE = replace(RECIPES["gn"], **SMALL)


def start(*flags, recipe=RECIPE, precision=None):
    """A run of the recipe before its first step."""
    where = [f"--data={TINY}", "--device=cpu", "--amp=O0", "--kind=perf"]
    return TrainingLoop(train, recipe, [*where, *flags], precision)


@pytest.fixture(scope="module")
def batch(tiny_train):
    return next(iter(build_loader(RECIPE, training_records(tiny_train), True, end=1)))


@pytest.fixture(scope="module")
def caffe_file(tmp_path_factory):
    """A backbone as Detectron2's file has it: a bias for the first convolution alone."""
    torch.manual_seed(0)
    backbone = build_model(RECIPE, 3).backbone.state_dict()
    state = {key: value for key, value in backbone.items() if "num_batches" not in key}
    path = tmp_path_factory.mktemp("weights") / "resnet14_msra.pth"
    checkpoint.save(path, {**state, "conv1.bias": torch.zeros(64)})
    return path


def mean_of_run(loop):
    return loop.state.description["recipe"]["mean"]


def is_frozen(loop):
    return loop.state.identity["backbone frozen"]


def test_without_weights_everything_trains_and_a_line_says_so(capsys):
    with start() as loop:
        assert not is_frozen(loop)
        assert all(p.requires_grad for p in loop.state.model.parameters())
    assert "weights: random: nothing is frozen, batch norm trains" in capsys.readouterr().out


def test_a_backbone_file_brings_its_mean_and_freezes(caffe_file, capsys):
    with start(f"--pretrained={caffe_file}") as loop:
        model = loop.state.model
        assert (RECIPE.mean, mean_of_run(loop)) == (DETECTRON_MEAN, DETECTRON2_MEAN)
        assert is_frozen(loop)
        assert not model.backbone.layer1[0].conv2.weight.requires_grad
        assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        trained = {id(p) for group in loop.state.optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    output = capsys.readouterr().out
    assert "resnet14_msra.pth: " in output
    assert "nothing is frozen" not in output
    assert f"mean = {DETECTRON2_MEAN}" in output  # the header has what is trained with


def test_header_and_checkpoint_have_the_precision_that_is_used(monkeypatch, capsys):
    monkeypatch.setattr("common.npu.precision.has_bf16", lambda device: False)
    with TrainingLoop(train, RECIPE, [f"--data={TINY}", "--device=cpu", "--kind=perf"]) as loop:
        assert (RECIPE.amp, loop.state.description["recipe"]["amp"]) == ("O1", "O0")
    assert "amp = 'O0'" in capsys.readouterr().out


def test_a_resumed_run_and_finetuning_keep_the_mean(caffe_file, tmp_path):
    path = tmp_path / "iter_0.pt"
    with start(f"--pretrained={caffe_file}") as loop:
        loop.state.save(path)
    with start(f"--resume={path}") as loop:
        assert is_frozen(loop)
        assert mean_of_run(loop) == DETECTRON2_MEAN
    with start(f"--checkpoint={path}") as loop:
        assert mean_of_run(loop) == DETECTRON2_MEAN


@pytest.mark.parametrize("of_ours", [True, False])
def test_the_mean_is_that_of_the_detector_not_of_the_backbone(caffe_file, tmp_path, of_ours):
    path = tmp_path / "detector.pth"
    with start() as loop:
        weights = loop.state.model.state_dict()
        if of_ours:
            loop.state.save(path)
        else:  # MMDetection's, which do not say their mean
            checkpoint.save(path, {"state_dict": weights})
    with start(f"--pretrained={caffe_file}", f"--checkpoint={path}") as loop:
        assert mean_of_run(loop) == RECIPE.mean == DETECTRON_MEAN
        assert torch.equal(
            loop.state.model.bbox_head.conv_cls.weight, weights["bbox_head.conv_cls.weight"]
        )


def test_finetuning_takes_the_network_of_the_checkpoint(tmp_path, capsys):
    path = tmp_path / "iter_0.pt"
    with start(recipe=replace(RECIPES["nogn"], **SMALL)) as loop:
        loop.state.save(path)
        weights = loop.state.model.state_dict()
    with start("--recipe=finetune", f"--checkpoint={path}") as loop:
        finetuned = loop.state.model.state_dict()
        assert loop.state.description["recipe"]["head_norm"] == "none"
    assert finetuned.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in finetuned.items())
    assert "head_norm 'none' instead of 'gn'" in capsys.readouterr().out


def test_the_command_that_started_a_run_resumes_it_with_its_network(tmp_path):
    start_file = tmp_path / "start.pt"
    with start(recipe=replace(RECIPES["nogn"], **SMALL)) as loop:
        loop.state.save(start_file)
    with start("--recipe=finetune", f"--checkpoint={start_file}") as loop:
        loop.state.save(tmp_path / "iter_0.pt")
    words = ("--recipe=finetune", f"--checkpoint={start_file}", f"--resume={tmp_path}/iter_0.pt")
    with start(*words) as loop:
        assert loop.state.description["recipe"]["head_norm"] == "none"
    with pytest.raises(UserError, match=r"--head_norm gn: .*iter_0\.pt was trained with none"):
        start(*words, "--head_norm=gn").__enter__()


def test_a_step_has_the_rate_of_the_batch_and_twice_as_much_for_biases(batch, capsys):
    with start() as loop:
        loop.step(batch)
        rates = [group["lr"] for group in loop.state.optimizer.param_groups]
    assert rates == pytest.approx([0.00125 / 3, 0.0025 / 3])
    assert "base learning rate 0.00125" in capsys.readouterr().out


def test_the_gradients_norm_before_clipping_is_logged(batch):
    with start(recipe=replace(RECIPE, clip_norm=0.01)) as loop:
        losses = loop.step(batch)
        groups = loop.state.optimizer.param_groups
        gradients = [p.grad.flatten() for group in groups for p in group["params"]]
    assert torch.cat(gradients).norm().item() == pytest.approx(0.01, rel=1e-3)  # clipped
    assert losses["grad_norm"] > 1


def test_a_skipped_overflow_is_no_reason_to_stop(batch):
    precision = Precision(torch.device("cpu"))
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    with start(precision=precision) as loop:
        losses = loop.step(batch)
        loop.state.progress.require_finite()
    assert losses["grad_norm"] == 0
    assert precision.scaler.get_scale() < 1e38
