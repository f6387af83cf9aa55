"""`--accumulate`: a batch in parts has the losses and gradients of the whole one."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.loop import TrainingLoop
from common.errors import UserError
from common.npu import accumulation, checkpoint
from common.npu.precision import Precision
from tests import scripts
from tests.small_models import ALL, MODELS, TFRECORD, module, small_recipe
from tests.test_own_data import SMALL

GOLDEN_RECORDS = scripts.ROOT / "tests/golden/ssd_resnet34_tfrecord/train2017*"
BATCH = 8
# Of fp32, relative to the largest gradient of a tensor.
ROUNDING = 2e-4
# In training; that of fcos is frozen where it starts from weights.
WITHOUT_BATCH_NORM = ("ssd_mmdet", "fcos")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=16, val=2)


def step_of(model, data, parts):
    """The losses and gradients of the first step of a program, with batch norms as they are."""
    recipe = replace(small_recipe(model), batch_size=BATCH)
    if model == TFRECORD:
        where = (f"--training_file_pattern={GOLDEN_RECORDS}", "--mode=train")
    else:
        where = (f"--data={data}", "--kind=perf")
    flags = [*where, "--device=cpu", f"--accumulate={parts}"]
    precision = Precision(torch.device("cpu"))
    with TrainingLoop(module(model, "train"), recipe, flags, precision) as loop:
        network = loop.state.model
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        losses = loop.step(next(iter(loop.loader)))
        gradients = {}
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
    return losses, gradients


@pytest.mark.parametrize("model", ALL)
def test_losses_and_gradients_are_those_of_the_whole_batch(model, data):
    losses, gradients = step_of(model, data, parts=1)
    assert losses["loss"] > 1
    assert len(gradients) > 20
    for parts in (2, 4):
        losses_of_parts, gradients_of_parts = step_of(model, data, parts)
        assert losses_of_parts == pytest.approx(losses, rel=1e-5)
        assert gradients_of_parts.keys() == gradients.keys()
        for name, gradient in gradients.items():
            limit = ROUNDING * gradient.abs().max().item()
            torch.testing.assert_close(gradients_of_parts[name], gradient, rtol=0, atol=limit)


def train(model, data, output, *flags):
    words = [*SMALL[model], "--device=cpu", "--amp=O0", "--num_workers=0", "--log_interval=1"]
    module(model, "train").main([*words, f"--data={data}", f"--output_dir={output}", *flags])
    return scripts.losses(output)


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """`weights(model)`: a flag that names trained weights of a model."""

    def train_a_step(model):
        output = tmp_path_factory.mktemp("weights") / "run"
        train(model, data, output, "--batch_size=2", "--max_iters=1", "--kind=perf")
        return f"--checkpoint={output}/iter_1.pt"

    return train_a_step


@pytest.mark.parametrize("model", WITHOUT_BATCH_NORM)
def test_a_run_in_parts_logs_what_the_run_in_whole_batches_does(model, data, weights, tmp_path):
    flags = (
        "--batch_size=4", "--max_iters=3", "--kind=perf", "--save_interval=1", "--keep=9",
        weights(model),
    )  # fmt: skip
    whole = train(model, data, tmp_path / "whole", *flags)
    parts = train(model, data, tmp_path / "parts", *flags, "--accumulate=2")
    assert parts.keys() == whole.keys() == {1, 2, 3}
    for step, losses in whole.items():
        assert parts[step] == pytest.approx(losses, rel=1e-4)
    log = (tmp_path / "parts/train_0.log").read_text()
    assert "--accumulate 2: a batch goes through the network in 2 parts of 2\n" in log
    assert "global batch 4 (1 x 4)" in log
    # Another number of parts is no other run.
    resume = f"--resume={tmp_path}/parts/iter_2.pt"
    train(model, data, tmp_path / "rest", *flags, "--accumulate=2", resume)
    scripts.assert_same_state(tmp_path / "parts/iter_3.pt", tmp_path / "rest/iter_3.pt")
    train(model, data, tmp_path / "other", *flags, "--accumulate=4", resume)


@pytest.mark.parametrize("model", ["fcos", pytest.param("ssd_mmdet", marks=pytest.mark.again)])
def test_two_ranks_exchange_the_gradients_of_all_parts(model, data, weights, tmp_path):
    """The divisors of fcos are means over ranks, asked for once a batch."""
    flags = (
        *SMALL[model], "--device=cpu", "--amp=O0", f"--data={data}", "--num_workers=0",
        "--log_interval=1", "--batch_size=4", "--max_iters=2", "--kind=perf", weights(model),
    )  # fmt: skip
    runs = {}
    for parts in (1, 2):
        output = tmp_path / str(parts)
        words = (*flags, f"--output_dir={output}", f"--accumulate={parts}")
        scripts.run(str(scripts.ROOT / model / "train.py"), *words, ranks=2)
        runs[parts] = scripts.losses(output)
    for step, losses in runs[1].items():
        assert runs[2][step] == pytest.approx(losses, rel=1e-4)
    one = checkpoint.load(tmp_path / "1/iter_2.pt")["model"]
    two = checkpoint.load(tmp_path / "2/iter_2.pt")["model"]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_batch_norm_is_told_of_and_wrong_numbers_are_refused(data, tmp_path, capsys):
    output = tmp_path / "run"
    flags = ("--batch_size=4", "--max_iters=1", "--kind=perf")
    with pytest.raises(UserError, match=r"--accumulate 3: .* --batch_size 4; give one of 1, 2, 4"):
        train("ssd_resnet34", data, output, *flags, "--accumulate=3")
    for batch in ("--batch_size=4", "--batch_size=auto"):
        with pytest.raises(SystemExit):
            train("ssd_resnet34", data, output, batch, "--accumulate=0")
        assert "--accumulate 0: must be at least 1" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"BN on the 1 x 1 map needs at least 2 images"):
        train("m2det", data, output, "--recipe=320_vgg", *flags, "--accumulate=4")
    assert not output.exists()
    train("ssd_resnet34", data, output, *flags, "--accumulate=2")
    log = (output / "train_0.log").read_text()
    assert "in 2 parts of 2; batch norm sees 2 images at a time" in log
    assert "--accumulate=2" in json.loads((output / "run.json").read_text())["command"]


def test_more_parts_are_advised_as_long_as_each_has_the_images_it_needs():
    assert accumulation.more_parts(8, count=2, least=1) == ["--accumulate=4"]
    assert accumulation.more_parts(8, count=2, least=2) == ["--accumulate=4"]
    assert accumulation.more_parts(8, count=4, least=1) == ["--accumulate=8"]
    assert accumulation.more_parts(8, count=4, least=2) == []
    assert accumulation.more_parts(8, count=8, least=1) == []


@pytest.mark.parametrize("model", MODELS)
def test_a_full_memory_says_what_to_lower(model, data, tmp_path, monkeypatch):
    """The second step does not find what it needs."""
    program = module(model, "train")
    augment = program.augment
    calls = []

    def augment_once(batch, recipe):
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
        return augment(batch, recipe)

    monkeypatch.setattr(program, "augment", augment_once)
    flags = ("--batch_size=8", "--kind=perf", "--save_interval=1", "--accumulate=2")
    with pytest.raises(UserError) as error:
        train(model, data, tmp_path / "run", *flags)
    text = str(error.value)
    assert text.startswith("the memory of the device is full in step 2: ")
    assert "--batch_size 8, --accumulate 2, precision O0 (float32" in text
    assert "give --accumulate=4 or half precision with --amp=O1 or a smaller --batch_size" in text
    assert f"last checkpoint: {tmp_path}/run/iter_1.pt" in text
    assert text.endswith("(CUDA out of memory. Tried to allocate 20 GiB.)")
    result = json.loads((tmp_path / "run/run.json").read_text())["result"]
    assert result.startswith("error: the memory of the device is full in step 2")
