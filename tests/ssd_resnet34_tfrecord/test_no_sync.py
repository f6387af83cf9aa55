"""A training step of the TFRecord recipe waits for nothing, and its shapes are fixed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.fps.window import LossWindow
from common.npu.distributed import Ranks
from common.npu.precision import Precision
from ssd_resnet34 import ssd_main
from ssd_resnet34.tfrecord import augment, loss
from ssd_resnet34.tfrecord.data import build_loader, training_records
from ssd_resnet34.tfrecord.index import read_index
from ssd_resnet34.tfrecord.train import Training
from ssd_resnet34.train import LOSSES
from tests.watch import Watch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def records(golden_dir):
    return training_records(read_index(str(golden_dir / "train2017*"), "flag"))


@pytest.mark.parametrize("all_at_once", [False, True])
def test_steps_wait_for_nothing_log_steps_too(recipe, records, monkeypatch, all_at_once):
    if all_at_once:  # as on an accelerator
        for module in (augment, loss):
            monkeypatch.setattr(module, "chunk_size", len)
    recipe = replace(recipe, backbone="resnet10", batch_size=2, clip_norm=10.0 * all_at_once)
    args = ssd_main.parse(["--log_interval=4", "--max_iters=8"])
    log = SimpleNamespace(info=lambda *text: None)
    parts = (CPU, Ranks(), Precision(CPU), log, records, records)
    run = Training(args, recipe, *parts)
    batches = list(build_loader(recipe, records, True, seed=2, end=4))
    batches[2] = batches[2]._replace(valid=torch.zeros_like(batches[2].valid))
    run.step(batches[0])
    calls = []
    for batch in batches[1:]:
        with Watch() as watch:
            run.step(batch)
        calls.append(watch.calls)
    # The same operations on the same shapes whatever the boxes; a log step adds the printed loss.
    assert len(calls[0]) > 500
    assert calls[1] == calls[0]
    assert len(calls[2]) > len(calls[0])
    assert list(run.printed) == [4]


def test_the_printed_loss_is_the_steps_with_its_decay_even_a_step_late(recipe, records, capsys):
    recipe = replace(recipe, backbone="resnet10", batch_size=2, weight_decay=0.1)
    args = ssd_main.parse(["--log_interval=1", "--max_iters=3", "--num_examples_per_epoch=12"])
    log = SimpleNamespace(train=lambda *line: None, info=lambda *text: None)
    run = Training(args, recipe, CPU, Ranks(), Precision(CPU), log, records, records)
    squares = []
    for batch in build_loader(recipe, records, True, seed=2, end=3):
        squares.append(sum(p.detach().square().sum().item() for p in run.model.parameters()))
        run.step(batch)
        run.report()  # as on an accelerator: of the step before
        run.meter.step(0.0)
        run.pending = run.iteration, run.window.fetch()
        run.window = LossWindow(LOSSES, CPU)
    printed = capsys.readouterr().out
    assert printed.count("global_step...") == 2
    (line,) = [line for line in printed.splitlines() if "FPS" in line]
    value = float(line.rpartition("loss: ")[2])
    assert value == pytest.approx(run.logged_losses[1] + 0.05 * squares[1], rel=1e-4)
