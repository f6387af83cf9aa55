"""`--profile`: the phases of a step, the longest operators, the trace and the loader alone."""

import gzip
import json
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from common.fps.profile import PHASES, WARM_UP_STEPS
from common.npu import checkpoint
from tests.common.test_run import RECIPE, parts_of, start

RECIPE_OF_PROFILE = replace(RECIPE, epochs=4)  # 16 steps


def augment(batch):
    return batch + 1


def step_through(folder, *words):
    """A loop of the calls that the models make."""
    run = start(folder, "--profile=2", *words)
    state, progress = parts_of(run, RECIPE_OF_PROFILE)
    network, optimizer = run.parallel(state.model, state.optimizer)
    augment_batch = run.compiled(augment, "augment")
    criterion = run.compiled(lambda outputs: outputs.square().sum(), "loss")
    loader = DataLoader(torch.ones(progress.end * 2, 2), batch_size=2)
    with run.open_output(RECIPE_OF_PROFILE, progress):
        progress.begin(8, 2, "rate 0.1")
        for step, batch in progress.steps(loader):
            optimizer.zero_grad()
            with run.precision.autocast():
                outputs = network(augment_batch(batch))
            loss = criterion(outputs.float())
            run.precision.backward(loss, optimizer)
            run.precision.step(optimizer)
            progress.add(step, {"loss_cls": loss, "loss": loss}, torch.tensor([10, 11]))
            if progress.checkpoint_due():
                state.save()
            assert not progress.evaluation_due()
        progress.finish()
    return progress


def test_a_profile_says_where_the_time_of_a_step_goes(tmp_path, capsys):
    progress = step_through(tmp_path)
    assert progress.steps_done == WARM_UP_STEPS + 4
    output = capsys.readouterr().out
    text = output[output.index("profile of 2 steps after 10 of warm-up") :]
    whole = float(re.search(r"warm-up: ([\d.]+) ms a step", text)[1])
    final = float(re.search(r"Final Performance images/sec : ([\d.]+)", text)[1])
    assert final == pytest.approx(2 * 1000 / whole, rel=0.05)  # of the timed steps only
    rows = re.findall(r"^  (\w+) +([\d.]+) ms +([\d.]+)%$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["data", *PHASES, "other"]
    assert sum(float(milliseconds) for _, milliseconds, _ in rows) == pytest.approx(whole, abs=0.2)
    assert all(float(milliseconds) > 0 for _, milliseconds, _ in rows[1:])
    operators = re.findall(r"^ +[\d.]+ +\d+ x (\S+)$", text, re.MULTILINE)
    assert len(operators) == 10
    assert not {*operators} & {*PHASES}
    assert re.search(r"^memory: \d+ MiB at most$", text, re.MULTILINE)
    assert "the loader alone: " in text
    assert "(batches: 14, workers: 0)" in text
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("backward") == 2  # of the steps under the profiler only
    assert checkpoint.checkpoints_newest_first(tmp_path) == []


def test_a_profile_is_of_a_new_run_that_is_long_enough(tmp_path):
    step_through(tmp_path)
    step_through(tmp_path, "--resume=auto")
    with pytest.raises(UserError, match=r"--profile: the measured run is a new one; omit --resume"):
        step_through(tmp_path, "--resume=iter_1.pt")
    with pytest.raises(UserError, match=r"--profile 4: needs 18 steps, this run has 16"):
        step_through(tmp_path, "--profile=4")


def test_a_limit_of_steps_that_a_profile_does_not_know_is_said(tmp_path, capsys):
    start(tmp_path, "--max_iters=5")
    assert "--max_iters" not in capsys.readouterr().out
    start(tmp_path, "--profile=2", "--max_iters=5")
    message = "--max_iters 5 has no effect: --profile 2 takes 14 steps"
    assert message in capsys.readouterr().out


def test_without_it_nothing_is_wrapped(tmp_path):
    run = start(tmp_path)
    assert run.compiled(augment, "augment") is augment
    state, _ = parts_of(run)
    network, _ = run.parallel(state.model, state.optimizer)
    assert "forward" not in vars(network)
    assert not {"backward", "step"} & vars(run.precision).keys()
