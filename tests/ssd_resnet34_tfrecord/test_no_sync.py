"""A training step of the TFRecord recipe waits for nothing, and its shapes are fixed."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.loop import TrainingLoop
from common.errors import UserError
from common.fps.progress import Progress
from common.npu.precision import Precision
from ssd_resnet34.tfrecord import train
from ssd_resnet34.tfrecord.data import build_loader, training_records
from ssd_resnet34.tfrecord.index import read_index
from tests.watch import Watch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def records(golden_dir):
    return training_records(read_index(str(golden_dir / "train2017*"), "flag"))


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
def test_steps_wait_for_nothing_log_steps_too(recipe, records, golden_dir, clip_norm):
    recipe = replace(recipe, backbone="resnet10", batch_size=2, clip_norm=clip_norm)
    flags = [f"--training_file_pattern={golden_dir}/train2017*", "--device=cpu", "--mode=train"]
    flags += ["--log_interval=4", "--max_iters=8"]
    batches = list(build_loader(recipe, records, True, seed=2, end=4))
    batches[2] = batches[2]._replace(valid=torch.zeros_like(batches[2].valid))
    calls = []
    # As on an accelerator, where a log line is written a step late.
    late = mock.patch("common.fps.progress.in_host_memory", return_value=False)
    with late, TrainingLoop(train, recipe, flags, Precision(CPU)) as loop:
        loop.step(batches[0])
        for batch in batches[1:]:
            watch = Watch()
            loop.step(batch, watch)
            calls.append(watch.calls)
    # The same operations on the same shapes whatever the boxes; a log step adds the printed loss.
    assert len(calls[0]) > 500
    assert calls[1] == calls[0]
    assert len(calls[2]) > len(calls[0])


def test_a_program_that_refuses_to_start_leaves_no_patch_behind(recipe):
    flags = ["--training_file_pattern=/none*", "--device=cpu", "--mode=train"]
    steps = Progress.steps
    with pytest.raises(UserError, match="matches no file"):
        TrainingLoop(train, recipe, flags, Precision(CPU)).__enter__()
    assert Progress.steps is steps


@pytest.mark.parametrize("in_host_memory", [True, False])
def test_the_printed_loss_is_the_steps_with_its_decay_even_a_step_late(
    golden_dir, tmp_path, monkeypatch, capsys, in_host_memory
):
    squares = []
    decay_term = train.decay_term

    def noted(parameters, weight_decay):
        parameters = list(parameters)
        squares.append(sum(p.detach().square().sum().item() for p in parameters))
        return decay_term(parameters, weight_decay)

    monkeypatch.setattr(train, "decay_term", noted)
    monkeypatch.setattr("common.fps.progress.in_host_memory", lambda device: in_host_memory)
    flags = [f"--training_file_pattern={golden_dir}/train2017*", "--device=cpu", "--mode=train"]
    flags += ["--recipe=small", "--train_batch_size=2", "--wd=0.1", "--num_workers=0"]
    flags += ["--log_interval=1", "--max_iters=3", f"--model_dir={tmp_path}/run"]
    assert train.main(flags) is None
    printed = capsys.readouterr().out
    assert printed.count("global_step...") == 3
    lines = [line for line in printed.splitlines() if "FPS: " in line]
    losses = [float(line.rpartition("loss: ")[2]) for line in lines]
    (log,) = (tmp_path / "run").glob("*.log.json")
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    logged = [line["loss"] for line in logged if line.get("mode") == "train"]
    expected = [loss + 0.05 * square for loss, square in zip(logged, squares, strict=True)]
    assert losses == pytest.approx(expected[1:], rel=1e-4)  # the first line has no speed yet
