"""A run's start, its state and the course of its steps, without a model of the product."""

import json
import os
import re
import shlex
import signal
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import fcos.config
import m2det.config
import ssd_mmdet.config
import ssd_resnet34.config
import ssd_resnet34.tfrecord.config
from common import flags
from common.coco.layout import Files
from common.errors import UserError
from common.fps import progress as progress_module
from common.fps.meter import Meter
from common.fps.progress import Progress
from common.npu import checkpoint
from common.npu import run as run_module
from common.npu.distributed import Ranks
from common.npu.precision import build_sgd
from common.npu.run import MAY_CHANGE, Process, Run, RunState, start_process
from tests import scripts

MODEL_RECIPES = (
    ssd_mmdet.config.Recipe,
    ssd_resnet34.config.Recipe,
    ssd_resnet34.tfrecord.config.Recipe,
    m2det.config.Recipe,
    fcos.config.Recipe,
)
CPU = torch.device("cpu")
LOSSES = ("loss_cls", "loss")


@dataclass(frozen=True)
class Recipe:
    model: ClassVar[str] = "tiny"
    name: str = "tiny"
    batch_size: int = 2
    epochs: int = 3
    evaluation: tuple[int, ...] = (1,)
    eval_interval: int = 0
    threshold: float = 0.5
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    augment: bool = True
    amp: str = "O0"
    loss_scale: str = "dynamic"

    def lr_at(self, iteration, iters_per_epoch, world_size, batch_size):
        return self.lr / (1 + iteration)

    def listing(self):
        return str(asdict(self))


class Records(list):
    class_names = ("cat", "hat")
    category_ids = (3, 7)

    def checksum(self):
        return sum(self)


RECIPE = Recipe()
RECORDS = Records(range(8))  # four steps an epoch
REMEDY = "lower --lr"


def start(folder, *words, recipe=RECIPE):
    parser = flags.make_parser("Train.", *flags.TRAINING_GROUPS)
    words = [f"--output_dir={folder}", "--device=cpu", "--log_interval=1", *words]
    return Run.start(parser.parse_args(words), recipe)


def parts_of(run, recipe=RECIPE, width=3, records=RECORDS):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    optimizer = build_sgd(
        list(model.parameters()),
        CPU,
        lr=0.1,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    progress = Progress(run, recipe, LOSSES, 4, recipe.epochs * 4, REMEDY)
    identity = {"width": width}
    ema = run.weight_average(model)
    state = RunState(run, model, ema, optimizer, progress, recipe, records, records, identity)
    return state, progress


def train(run, state, progress, batches=None, evaluate=lambda: None):
    """A loop as the models have it."""
    batches = batches or [torch.full((2, 2), float(k)) for k in range(progress.end)]
    with run.open_output(RECIPE, progress):
        progress.begin(len(RECORDS), 2, "rate 0.1")
        for step, batch in progress.steps(batches[progress.steps_done :]):
            state.optimizer.zero_grad()
            loss = state.model(batch).square().sum() + batch.sum()
            loss.backward()
            state.optimizer.step()
            state.ema.update()
            progress.add(step, {"loss_cls": loss, "loss": loss}, torch.tensor([10, 11]))
            state.look_for_metrics()
            if progress.checkpoint_due():
                state.save()
            if progress.evaluation_due():
                evaluate()
        if progress.interrupted:
            state.save()
            return progress.exit_status()
        progress.finish()
    return None


def opened(run, data_files=()):
    """The output folder of a run that does nothing in it."""
    return run.open_output(RECIPE, parts_of(run)[1], data_files)


def evaluation(ap):
    metrics = {"bbox_mAP": ap, "bbox_mAP_50": ap, "bbox_mAP_75": ap}
    return SimpleNamespace(
        stats={"AP": ap},
        text=f"table of {ap}",
        classes=[],
        mmdet=lambda: metrics,
        pictures=list,
    )


def test_nothing_is_written_before_the_output_is_opened(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train_0.log").write_text("of a former run")
    run = start(tmp_path / "run")
    state, progress = parts_of(run)
    state.restore()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "train_0.log"]
    train(run, state, progress)
    (moved,) = tmp_path.glob("run_*")
    assert (moved / "train_0.log").read_text() == "of a former run"
    assert f"the former run in {tmp_path}/run is now {moved}" in run.log.text_path.read_text()


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = start(tmp_path / "whole", "--kind=perf")
    state, progress = parts_of(whole)
    train(whole, state, progress)
    expected = checkpoint.load(tmp_path / "whole" / "iter_12.pt")

    first = start(tmp_path / "run", "--kind=perf", "--max_iters=5", "--save_interval=5")
    state, progress = parts_of(first)
    train(first, state, progress)
    second = start(tmp_path / "run", "--kind=perf", "--resume=auto")
    state, progress = parts_of(second)
    state.restore()
    assert progress.steps_done == 5
    train(second, state, progress)
    found = checkpoint.load(tmp_path / "run" / "iter_12.pt")
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    assert found["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    assert found["classes"] == ["cat", "hat"]
    assert found["category_ids"] == [3, 7]


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_averaged_weights_go_on_where_they_were(tmp_path):
    flags = ("--kind=perf", "--ema=0.3")
    whole = start(tmp_path / "whole", *flags)
    train(whole, *parts_of(whole))
    expected = checkpoint.load(tmp_path / "whole" / "iter_12.pt")
    assert expected["ema"]["updates"] == 12
    assert not same(expected["ema"]["model"], expected["model"])

    first = start(tmp_path / "run", *flags, "--max_iters=5")
    train(first, *parts_of(first))
    second = start(tmp_path / "run", *flags, "--resume=auto")
    state, progress = parts_of(second)
    state.restore()
    assert state.ema.updates == 5
    train(second, state, progress)
    found = checkpoint.load(tmp_path / "run" / "iter_12.pt")
    assert same(expected["model"], found["model"])
    assert same(expected["ema"]["model"], found["ema"]["model"])
    assert found["ema"]["updates"] == 12

    third = start(tmp_path / "third", "--ema=0.5", f"--resume={tmp_path}/run/iter_12.pt")
    parts_of(third)[0].restore()
    with opened(third):
        pass
    assert "from here on --ema is 0.5; it was 0.3" in third.log.text_path.read_text()


def test_a_resumed_run_says_what_becomes_of_averaged_weights(tmp_path):
    plain = start(tmp_path / "plain", "--kind=perf", "--max_iters=2")
    train(plain, *parts_of(plain))
    file = tmp_path / "plain" / "iter_2.pt"
    assert "ema" not in checkpoint.load(file)
    averaged = start(tmp_path / "averaged", "--max_iters=2", f"--resume={file}", "--ema=0.9")
    state, progress = parts_of(averaged)
    state.restore()
    assert same(state.model.state_dict(), state.ema.model.state_dict())
    state.progress.steps_done = 1  # as if a step were left
    train(averaged, state, progress)
    line = f"{file}: has no averaged weights: --ema begins with its weights"
    assert line in averaged.log.text_path.read_text()
    file = tmp_path / "averaged" / "iter_2.pt"
    assert checkpoint.load(file)["ema"]["updates"] == 1

    without = start(tmp_path / "without", f"--resume={file}")
    state, _ = parts_of(without)
    state.restore()
    assert same(state.model.state_dict(), checkpoint.load(file)["model"])
    with opened(without):
        pass
    line = f"{file}: without --ema its averaged weights are dropped"
    assert line in without.log.text_path.read_text()


def test_a_resumed_run_says_that_batch_norm_sees_other_images(tmp_path):
    first = start(tmp_path, "--kind=perf", "--max_iters=2", "--sync_bn")
    train(first, *parts_of(first))
    for words, lines in (
        (["--sync_bn"], []),
        (["--accumulate=2"], ["--accumulate is 2; it was 1", "--sync_bn is False; it was True"]),
    ):
        second = start(tmp_path, *words, "--resume=auto")
        parts_of(second)[0].restore()
        with opened(second):
            pass
        log = second.log.text_path.read_text()
        assert re.findall("from here on (--.*)", log) == lines


@pytest.mark.parametrize("decay", ["1", "1.5"])
def test_what_is_no_decay_is_refused(tmp_path, decay):
    with pytest.raises(UserError, match=f"--ema {decay}: not a number from 0 to below 1; give"):
        start(tmp_path, f"--ema={decay}")


def test_averages_that_are_not_finite_are_not_written(tmp_path):
    run = start(tmp_path, "--ema=0.9", "--max_iters=1", "--kind=perf")
    state, progress = parts_of(run)
    state.ema.model[0].weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=f"weights are not finite; {REMEDY}"):
        train(run, state, progress)
    assert not list(tmp_path.glob("*.pt"))


def test_a_run_resumed_from_an_earlier_file_leaves_the_later_ones(tmp_path):
    first = start(tmp_path, "--kind=perf", "--max_iters=4", "--save_interval=2")
    train(first, *parts_of(first))
    second = start(tmp_path, "--kind=perf", "--max_iters=3", f"--resume={tmp_path}/iter_2.pt")
    state, progress = parts_of(second)
    state.restore()
    train(second, state, progress)
    assert [path.name for path in checkpoint.checkpoints_newest_first(tmp_path)] == [
        "iter_3.pt",
        "iter_2.pt",
    ]
    assert checkpoint.load(tmp_path / "iter_4.pt.superseded")["iteration"] == 4
    assert (
        "iter_4.pt is later than the resumed state: set aside" in second.log.text_path.read_text()
    )


def test_a_run_resumed_from_another_folder_begins_one_of_its_own(tmp_path):
    first = start(tmp_path / "first", "--kind=perf", "--max_iters=1")
    train(first, *parts_of(first))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train_0.log").write_text("of a former run")
    file = tmp_path / "first" / "iter_1.pt"
    second = start(tmp_path / "run", "--kind=perf", "--max_iters=2", f"--resume={file}")
    state, progress = parts_of(second)
    state.restore()
    train(second, state, progress)
    (moved,) = tmp_path.glob("run_*")
    assert (moved / "train_0.log").read_text() == "of a former run"
    assert file.exists()
    assert checkpoint.load(tmp_path / "run" / "iter_2.pt")["iteration"] == 2


@pytest.mark.parametrize("link_is_in_the_folder", [True, False])
def test_a_run_goes_on_in_its_folder_through_a_link(tmp_path, link_is_in_the_folder):
    """The checkpoint may lie on another disk, or the name that is given may."""
    folder = tmp_path / "run"
    first = start(folder, "--kind=perf", "--max_iters=1")
    train(first, *parts_of(first))
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    resume = "auto"
    if link_is_in_the_folder:
        (folder / "iter_1.pt").rename(elsewhere / "iter_1.pt")
        (folder / "iter_1.pt").symlink_to(elsewhere / "iter_1.pt")
    else:
        (elsewhere / "last.pt").symlink_to(folder / "iter_1.pt")
        resume = elsewhere / "last.pt"
    second = start(folder, "--kind=perf", "--max_iters=2", f"--resume={resume}")
    state, progress = parts_of(second)
    state.restore()
    train(second, state, progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "run"]
    assert checkpoint.load(folder / "iter_2.pt")["iteration"] == 2


def test_nothing_to_resume_is_said_with_the_run_that_was_renamed(tmp_path, capsys):
    folder = tmp_path / "run"
    nothing = f"INFO - --resume auto: no whole checkpoint in {folder}: a new run begins\n"
    assert start(folder, "--resume=auto").resumed is None
    output = capsys.readouterr().out
    assert nothing in output
    assert "former" not in output
    # Neither a folder of another name nor one without a checkpoint is a former run.
    for name in ("run_old", "run_20990101_000000_000000", "run_20260101_000000_000000"):
        (tmp_path / name).mkdir()
    for name in ("run_old", "run_20260101_000000_000000"):
        (tmp_path / name / "iter_7.pt").touch()
    start(folder, "--resume=auto")
    former = tmp_path / "run_20260101_000000_000000" / "iter_7.pt"
    output = capsys.readouterr().out
    assert nothing in output
    assert f"WARNING - a former run was renamed; --resume={former} goes on with it\n" in output
    start(folder)
    assert "resume" not in capsys.readouterr().out


def test_what_may_change_takes_effect_in_optimizer_checkpoint_and_log(tmp_path):
    run = start(tmp_path, "--max_iters=2", "--kind=perf")
    train(run, *parts_of(run))
    changed = replace(RECIPE, lr=0.5, momentum=0.5, weight_decay=0.25, epochs=1)
    resumed = start(tmp_path, "--resume=auto", "--kind=perf", recipe=changed)
    state, progress = parts_of(resumed, changed)
    state.restore()
    train(resumed, state, progress)
    saved = checkpoint.load(tmp_path / "iter_4.pt")
    for group in (*state.optimizer.param_groups, *saved["optimizer"]["param_groups"]):
        assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)
    assert saved["recipe"] == asdict(changed)
    text = resumed.log.text_path.read_text()
    for line in (
        "from here on epochs is 1; it was 3",
        "from here on lr is 0.5; it was 0.1",
        "from here on momentum is 0.5; it was 0.9",
        "from here on weight_decay is 0.25; it was 0.0",
    ):
        assert text.count(f"INFO - {line}\n") == 1
    assert text.count("from here on") == 4


def test_a_run_that_is_past_its_end_says_so(tmp_path):
    run = start(tmp_path, "--max_iters=3", "--kind=perf")
    train(run, *parts_of(run))
    shorter = start(tmp_path, "--resume=auto", "--max_iters=2")
    state, progress = parts_of(shorter)
    state.restore()
    train(shorter, state, progress)
    log = shorter.log.text_path.read_text()
    assert "has done 3 steps, more than the 2 of this one: nothing is trained; raise" in log
    assert "Final Train Accuracy" not in log  # there was no evaluation
    assert "TrainAccuracy" not in (tmp_path / "tiny_bs2_1p_acc.log").read_text()


def test_all_that_may_not_change_is_named_at_once(tmp_path):
    run = start(tmp_path, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    changed = replace(RECIPE, lr=0.5, augment=False, batch_size=4)
    resumed = start(tmp_path, "--resume=auto", recipe=changed)
    state, _ = parts_of(resumed, changed)
    message = (
        "this run differs in global batch (2 before, 4 now), augment (True before, False now); go "
        "on as it was"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        state.restore()


def test_the_fields_that_may_change_are_fields_of_recipes():
    names = set()
    for recipe in MODEL_RECIPES:
        names.update(field.name for field in fields(recipe))
    assert names >= MAY_CHANGE


@pytest.mark.parametrize(
    ("words", "width", "message"),
    [
        (["--seed=5"], 3, r"differs in seed \(0 before, 5 now\)"),
        ([], 4, r"differs in width \(3 before, 4 now\)"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, words, width, message):
    run = start(tmp_path, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    resumed = start(tmp_path, "--resume=auto", *words)
    state, _ = parts_of(resumed, width=width)
    with pytest.raises(
        UserError, match=rf"iter_1\.pt: this run {message}; go on as it was, or start anew"
    ):
        state.restore()


def test_a_run_is_not_resumed_on_another_set_of_as_many_images(tmp_path):
    run = start(tmp_path, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    state, _ = parts_of(start(tmp_path, "--resume=auto"), records=Records(range(1, 9)))
    with pytest.raises(
        UserError, match=r"differs in checksum of the training set \(28 before, 36 now\); go on"
    ):
        state.restore()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value[:, :1], r"1 of another shape: 0\.weight \["),
        (lambda value: value.long(), r"0\.weight is of the dtype int64, not of floating-point"),
        (lambda value: value * float("nan"), r"0\.weight has values that are not finite numbers"),
    ],
)
def test_a_run_is_not_resumed_with_other_weights(change, words, tmp_path):
    run = start(tmp_path, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    file = tmp_path / "iter_1.pt"
    saved = checkpoint.load(file)
    saved["model"]["0.weight"] = change(saved["model"]["0.weight"])
    checkpoint.save(file, saved)
    state, _ = parts_of(start(tmp_path, "--resume=auto"))
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: .*{words}"):
        state.restore()


def test_weights_that_a_resumed_run_does_not_read_are_said(tmp_path, capsys):
    run = start(tmp_path, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    start(tmp_path, "--resume=auto", "--checkpoint=other.pt")
    assert "--checkpoint other.pt is not read: the resumed run has" in "".join(capsys.readouterr())


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    run = start(tmp_path, "--kind=perf", "--save_interval=1")
    state, progress = parts_of(run)
    batches = [torch.ones(2, 2), torch.ones(2, 2), torch.full((2, 2), float("nan"))]
    with pytest.raises(UserError) as error:
        train(run, state, progress, batches)
    message = str(error.value)
    assert message.startswith("loss_cls is not finite, first at iteration 3 (epoch 1) on rank 0")
    assert "images [10, 11]" in message
    assert f"last good checkpoint: {tmp_path}/iter_2.pt; lower --lr; to draw the " in message
    command = shlex.split(message.partition("to draw the images of this step: ")[2])
    assert command[:5] == ["cd", os.getcwd(), "&&", sys.executable, sys.argv[0]]
    assert command[5] == f"--output_dir={tmp_path}"
    assert command[-2:] == ["--save_interval=1", "--replay=3"]


def test_the_command_of_several_ranks_runs_on_the_first_card(tmp_path):
    run = start(tmp_path, "--tag=a b", "--device_id=8")
    run.ranks = Ranks(rank=3, world_size=8)
    command = run.replay_command(5)
    assert command.endswith(" '--tag=a b' --device_id=8 --replay=5 --device_id=0")


@pytest.mark.parametrize("flag", ["--look=1", "--replay=1"])
def test_samples_are_drawn_by_one_process(flag, tmp_path, monkeypatch):
    process = Process(Ranks(world_size=2), CPU, "")
    monkeypatch.setattr(run_module, "start_process", lambda *arguments: process)
    with pytest.raises(UserError, match="--look and --replay need one process; start it with"):
        start(tmp_path, flag)


def test_several_ranks_with_sync_bn_do_not_compile_the_network(tmp_path, monkeypatch):
    process = Process(Ranks(world_size=2), CPU, "")
    monkeypatch.setattr(run_module, "start_process", lambda *arguments: process)
    args = flags.make_parser("Train.", *flags.TRAINING_GROUPS).parse_args(["--sync_bn"])
    compiler = SimpleNamespace(compiles_networks=True)
    monkeypatch.setattr(run_module, "Compiler", lambda *arguments: compiler)
    with pytest.raises(UserError, match="--sync_bn: not with --compile; omit one of them"):
        Run.start(args, RECIPE)


def test_the_step_of_a_replay_is_that_of_the_last_process_that_did_it(tmp_path):
    flags = ("--kind=perf", "--save_interval=2", "--keep=9")
    run = start(tmp_path, "--max_iters=6", *flags)
    train(run, *parts_of(run))
    resumed = start(tmp_path, "--max_iters=8", *flags, f"--resume={tmp_path}/iter_4.pt")
    state, progress = parts_of(resumed)
    state.restore()
    train(resumed, state, progress)
    logs = sorted(tmp_path.glob("*.log.json"))
    header = json.loads(logs[-1].read_text().partition("\n")[0])
    assert header["first_step"] == 5
    changed = json.dumps({**header, "ranks": 4})
    logs[-1].write_text(changed + logs[-1].read_text()[len(json.dumps(header)) :])

    for step, world_size, steps_of_weights in ((4, 1, 2), (5, 4, 4), (8, 4, 6)):
        replayed = start(tmp_path, f"--replay={step}")
        assert replayed.only_draws
        assert replayed.drawn_world_size == world_size
        assert replayed.replayed.index_of_batch == step - 1
        assert replayed.resumed["iteration"] == steps_of_weights
    repeated = start(tmp_path, "--replay=8", "--fake_input")
    assert repeated.replayed.index_of_batch == 4


def test_a_log_of_an_earlier_version_leaves_the_ranks_to_the_checkpoint(tmp_path):
    run = start(tmp_path, "--max_iters=4", "--kind=perf", "--save_interval=2")
    train(run, *parts_of(run))
    [log] = tmp_path.glob("*.log.json")
    log.write_text('{"env_info": "", "seed": 1}\n')
    assert start(tmp_path, "--replay=3").drawn_world_size == 1
    with pytest.raises(UserError, match="does not say on how many ranks the run was, and there is"):
        start(tmp_path, "--replay=2")
    log.unlink()
    assert start(tmp_path, "--replay=3").replayed.seed is None
    with pytest.raises(UserError, match="has neither a log nor a checkpoint before that step"):
        start(tmp_path, "--replay=2")


def test_an_evaluation_is_due_after_its_epochs_and_at_the_end(tmp_path):
    run = start(tmp_path)
    state, progress = parts_of(run)
    evaluated = []

    def evaluate():
        evaluated.append(progress.steps_done)
        # A state of this step is there already: a run that ends in its evaluation repeats it.
        assert (tmp_path / f"iter_{progress.steps_done}.pt").exists()
        ap = 0.1 * len(evaluated)
        assert progress.add_evaluation(evaluation(ap), progress.begin_evaluation())
        assert not progress.evaluation_due()

    train(run, state, progress, evaluate=evaluate)
    assert evaluated == [4, 12]
    assert "TrainAccuracy = 0.20000" in (tmp_path / "tiny_bs2_1p_acc.log").read_text()


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (replace(RECIPE, evaluation=(), eval_interval=2), [8, 12]),
        (replace(RECIPE, evaluation=(1,), eval_interval=2), [4, 8, 12]),
        (replace(RECIPE, evaluation=(), eval_interval=-1), [4, 8, 12]),
        (replace(RECIPE, evaluation=(), eval_interval=-1, epochs=21), [*range(8, 84, 8), 84]),
        (replace(RECIPE, evaluation=(3,), eval_interval=-1, epochs=21), [12, 84]),
    ],
)
def test_evaluations_have_an_interval(tmp_path, recipe, steps):
    _, progress = parts_of(start(tmp_path, recipe=recipe), recipe)
    due = []
    for steps_done in range(progress.end + 1):
        progress.steps_done = steps_done
        if progress.evaluation_due():
            due.append(steps_done)
    assert due == steps


def test_a_goal_ends_the_run(tmp_path):
    run = start(tmp_path)
    state, progress = parts_of(run)

    def evaluate():
        progress.add_evaluation(evaluation(0.5), progress.begin_evaluation())

    train(run, state, progress, evaluate=evaluate)
    assert progress.steps_done == 4
    assert "AP goal 0.5 reached: training ends here" in run.log.text_path.read_text()


def test_patience_ends_the_run_and_a_resumed_run_goes_on_counting(tmp_path):
    recipe = replace(RECIPE, threshold=0.0, epochs=9, evaluation=tuple(range(1, 9)))
    aps = {4: 0.2, 8: 0.3, 12: 0.25, 16: 0.3, 20: 0.1, 24: 0.4}

    def go(folder, *words, batches=None):
        run = start(folder, "--patience=3", *words, recipe=recipe)
        state, progress = parts_of(run, recipe)
        state.restore()
        train(run, state, progress, batches, lambda: state.add_evaluation(look_up, aps))
        return run.log.text_path.read_text(), progress

    log, progress = go(tmp_path / "whole")
    assert progress.steps_done == 20
    line = "AP has not risen above 0.30000 in 3 evaluations (--patience): training ends here"
    assert line in log
    assert "Final Train Accuracy : 0.10000" in log
    assert checkpoint.load(tmp_path / "whole" / "best.pt")["iteration"] == 8
    assert (tmp_path / "whole" / "iter_20.pt").exists()

    # Once interrupted before an evaluation, once from the best state, whose evaluation is repeated.
    _, progress = go(tmp_path / "half", batches=InterruptedBatches(14))
    assert progress.steps_done == 14
    log, progress = go(tmp_path / "half", "--resume=auto")
    assert (progress.steps_done, line in log) == (20, True)
    log, progress = go(tmp_path / "other", f"--resume={tmp_path}/whole/best.pt")
    assert (progress.steps_done, line in log) == (20, True)


def test_patience_ends_a_run_whose_metrics_come_late(tmp_path):
    recipe = replace(RECIPE, threshold=0.0, epochs=9, evaluation=(1, 2))
    run = start(
        tmp_path, "--patience=1", "--background_metrics", "--save_interval=4", recipe=recipe
    )
    state, progress = parts_of(run, recipe)
    aps = {4: 0.3, 8: 0.3}
    train(run, state, progress, evaluate=lambda: state.add_evaluation(look_up, aps))
    assert 8 < progress.steps_done <= 12
    assert "AP has not risen above 0.30000 in 1 evaluations" in run.log.text_path.read_text()
    assert "TrainAccuracy = 0.30000" in (tmp_path / "tiny_bs2_1p_acc.log").read_text()
    assert checkpoint.load(tmp_path / f"iter_{progress.steps_done}.pt")["best"] == 0.3


def test_the_last_steps_of_a_run_that_ends_early_are_logged(tmp_path):
    recipe = replace(RECIPE, threshold=0.0, epochs=9, evaluation=(1, 2))
    run = start(tmp_path, "--patience=1", recipe=recipe)
    run.settings = replace(run.settings, log_seconds=1e6)
    state, progress = parts_of(run, recipe)
    aps = {4: 0.3, 8: 0.3}
    train(run, state, progress, evaluate=lambda: state.add_evaluation(look_up, aps))
    assert progress.logged_at == 8
    lines = run.log.text_path.read_text().splitlines()
    assert [line for line in lines if "Epoch [" in line and "[4/4]" in line]


def test_the_table_of_the_last_evaluation_is_logged_at_the_end(tmp_path):
    recipe = replace(RECIPE, threshold=0.0, epochs=9, evaluation=(1, 2))
    run = start(tmp_path, "--patience=1", recipe=recipe)
    assert not run.evaluation_options.table
    state, progress = parts_of(run, recipe)
    aps = {4: 0.3, 8: 0.2}
    train(run, state, progress, evaluate=lambda: state.add_evaluation(look_up, aps))
    lines = run.log.text_path.read_text().splitlines()
    assert [line for line in lines if "table of" in line] == ["table of 0.2"]


def test_patience_needs_evaluations(tmp_path):
    with pytest.raises(UserError, match="--patience 2: this run does not evaluate; omit it"):
        start(tmp_path, "--patience=2", "--kind=perf")


@dataclass
class Metrics:
    """An evaluation that a process can send."""

    ap: float

    @property
    def stats(self):
        return {"AP": self.ap}

    @property
    def text(self):
        return f"table of {self.ap}"

    classes = ()

    def pictures(self):
        return []

    def mmdet(self):
        return {"bbox_mAP": self.ap, "bbox_mAP_50": self.ap, "bbox_mAP_75": self.ap}


def look_up(aps, folder, options, log, step):
    """The `evaluate_and_save` of these tests: the AP of a step; an error where there is none."""
    log(f"step {step} is evaluated")
    if step not in aps:
        raise UserError("no AP", "give one")
    return Metrics(aps[step])


def run_with_metrics(folder, aps, *words, batches=None):
    """Train with evaluations after 4, 8 and 12 steps; return the run and its course."""
    run = start(folder, *words, recipe=replace(RECIPE, evaluation=(1, 2)))
    state, progress = parts_of(run, replace(RECIPE, evaluation=(1, 2)))
    state.restore()
    status = train(run, state, progress, batches, lambda: state.add_evaluation(look_up, aps))
    return run, progress, status


def test_metrics_in_the_background_change_nothing_but_when_they_are_logged(tmp_path):
    aps = {4: 0.3, 8: 0.2, 12: 0.1}
    of_runs = []
    for name, flag in (("one", "--no-background_metrics"), ("other", "--background_metrics")):
        run, progress, _ = run_with_metrics(tmp_path / name, aps, flag, "--keep=9")
        assert (progress.best_ap, progress.last_ap) == (0.3, 0.1)
        lines = [line for line in scripts.json_lines(tmp_path / name) if line.get("mode") == "val"]
        files = sorted(path.name for path in (tmp_path / name).glob("*.pt"))
        of_runs.append((lines, files))
        text = run.log.text_path.read_text()
        # A state that is resumed does not repeat what came before it.
        assert text.index("step 4 is evaluated") < text.index("iter_8.pt")
        assert text.index("step 8 is evaluated") < text.index("iter_12.pt")
    assert of_runs[0] == of_runs[1]
    assert [line["steps_done"] for line in of_runs[0][0]] == [4, 8, 12]
    for name in ("best.pt", "iter_12.pt"):
        scripts.assert_same_state(tmp_path / "one" / name, tmp_path / "other" / name)
    assert checkpoint.load(tmp_path / "other" / "best.pt")["iteration"] == 4
    assert "the metrics of step 4 are computed in the background" in text
    assert "the metrics of step 12" not in text  # nothing is left to train


def test_a_goal_in_the_background_ends_the_run_with_the_state_that_reached_it(tmp_path):
    run, progress, _ = run_with_metrics(tmp_path, {4: 0.6}, "--background_metrics")
    assert 4 < progress.steps_done <= 8
    assert checkpoint.load(tmp_path / "best.pt")["iteration"] == 4
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["best.pt", "iter_4.pt"]
    text = run.log.text_path.read_text()
    assert "AP goal 0.5 reached: training ends here" in text
    assert "Final Train Accuracy : 0.60000" in text


def test_a_failure_in_the_background_ends_the_run_and_is_repeated_by_the_next(tmp_path):
    with pytest.raises(UserError, match=r"^the metrics of step 4: no AP; give one$"):
        run_with_metrics(tmp_path, {}, "--background_metrics")
    run = start(tmp_path, "--resume=auto")
    state, progress = parts_of(run)
    state.restore()
    assert progress.steps_done == 4
    assert progress.evaluation_due()


def test_an_interrupted_run_waits_for_its_metrics(tmp_path):
    run, _, status = run_with_metrics(
        tmp_path, {4: 0.3}, "--background_metrics", batches=InterruptedBatches(5)
    )
    assert status == 128 + signal.SIGTERM
    assert checkpoint.load(tmp_path / "best.pt")["iteration"] == 4
    assert checkpoint.load(tmp_path / "iter_5.pt")["best"] == 0.3
    assert "step 4 is evaluated" in run.log.text_path.read_text()


class InterruptedBatches:
    """Batches of which one brings a signal to stop with it."""

    def __init__(self, interrupted):
        self.interrupted = interrupted

    def __getitem__(self, position):
        return iter(self)

    def __iter__(self):
        for number in range(36):
            if number == self.interrupted:
                os.kill(os.getpid(), signal.SIGTERM)
            yield torch.full((2, 2), float(number))


def test_a_worse_evaluation_is_not_the_best(tmp_path):
    run = start(tmp_path)
    _, progress = parts_of(run)
    run.log.open(tmp_path, 0)
    progress.steps_done = 4
    assert progress.add_evaluation(evaluation(0.2), 4)
    assert not progress.add_evaluation(evaluation(0.1), 4)
    assert (progress.best_ap, progress.last_ap) == (0.2, 0.1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("a.jpg: cannot read the image"), r"^a\.jpg: cannot read the image$"),
        (EOFError(), "^a loader worker has closed its connection, .*; a run goes on with --resume"),
    ],
)
def test_bad_data_ends_the_run_with_a_checkpoint(tmp_path, error, message):
    def batches():
        yield torch.ones(2, 2)
        raise error

    class Loader:
        def __getitem__(self, key):
            return batches()

    run = start(tmp_path, "--kind=perf")
    state, progress = parts_of(run)
    with pytest.raises(UserError, match=message):
        train(run, state, progress, Loader())
    assert [path.name for path in checkpoint.checkpoints_newest_first(tmp_path)] == ["iter_1.pt"]


class Dying(torch.utils.data.Dataset):
    """Its worker is killed, as by a host without memory, at item 4."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(2)


class Unsliced:
    def __init__(self, loader):
        self.loader = loader

    def __getitem__(self, key):
        return self.loader


def test_a_worker_that_dies_ends_the_run_with_a_checkpoint(tmp_path):
    run = start(tmp_path, "--kind=perf", "--save_interval=100")
    loader = torch.utils.data.DataLoader(Dying(), batch_size=2, num_workers=1, prefetch_factor=1)
    with pytest.raises(UserError, match=r"^a loader worker has ended, .*; lower --num_workers; "):
        train(run, *parts_of(run), Unsliced(loader))
    (saved,) = checkpoint.checkpoints_newest_first(tmp_path)
    assert checkpoint.load(saved)["iteration"] in (1, 2)  # the last step whose batch arrived


def test_a_batch_larger_than_the_data_set_is_said(tmp_path, capsys):
    run = start(tmp_path)
    _, progress = parts_of(run)
    progress.begin(2, 2, "rate 0.1")
    assert "larger" not in capsys.readouterr().out
    progress.begin(1, 2, "rate 0.1")
    assert (
        "the global batch of 2 images is larger than the data set of 1: a step sees images more "
        "than once; lower --batch_size"
    ) in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
def test_a_missing_evaluator_is_found_at_the_start(tmp_path, monkeypatch, backend):
    package = {"pycocotools": "pycocotools.coco", "faster": "faster_coco_eval"}[backend]
    monkeypatch.setitem(sys.modules, package, None)
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=rf"{package}.*; pip install pycocotools faster-coco-eval"):
        start(folder, f"--eval_backend={backend}")
    assert not folder.exists()
    start(folder, f"--eval_backend={backend}", "--kind=perf")


def test_log_lines_begin_anew_with_every_epoch(tmp_path):
    run = start(tmp_path)
    run.settings = SimpleNamespace(max_iters=0, log_interval=3, log_seconds=0.0)
    progress = Progress(run, RECIPE, LOSSES, 7, 21, REMEDY)
    assert [step for step in range(1, 22) if progress.log_due(step)] == [3, 6, 10, 13, 17, 20]
    whole = Progress(run, RECIPE, LOSSES, 7, 21, REMEDY, log_period=21)
    assert [step for step in range(1, 22) if whole.log_due(step)] == [3, 6, 9, 12, 15, 18, 21]


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def steps_of_lines(folder, monkeypatch, *words, seconds_a_step=0.1):
    """Train 40 steps of that time; return the run, and after which of them log lines follow."""
    clock = Clock()
    meter = partial(Meter, clock=clock)
    monkeypatch.setattr(progress_module, "Meter", meter)
    parser = flags.make_parser("Train.", *flags.TRAINING_GROUPS)
    words = [f"--output_dir={folder}", "--device=cpu", "--kind=perf", *words]
    run = Run.start(parser.parse_args(words), RECIPE)
    recipe = replace(RECIPE, epochs=10)
    state, progress = parts_of(run, recipe)

    class Batches:
        def __getitem__(self, position):
            for _ in range(progress.end):
                clock.seconds += seconds_a_step
                yield torch.ones(2, 2)

    train(run, state, progress, Batches())
    return run, [line["step"] for line in scripts.json_lines(folder) if "step" in line]


def test_a_log_line_follows_at_most_every_second_unless_an_interval_is_given(tmp_path, monkeypatch):
    run, lines = steps_of_lines(tmp_path / "default", monkeypatch)
    assert lines == [2, 22, 40]
    _, lines = steps_of_lines(tmp_path / "fast", monkeypatch, seconds_a_step=0.03)
    assert lines == [2, 36, 40]
    # The first epoch's state and the last one.
    assert run.log.text_path.read_text().count("Saving checkpoint") == 2
    assert (tmp_path / "default" / "iter_40.pt").exists()
    _, lines = steps_of_lines(tmp_path / "given", monkeypatch, "--log_interval=20")
    assert lines == list(range(2, 41, 2))  # two an epoch


def test_epochs_of_minutes_have_a_checkpoint_each(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    run, _ = steps_of_lines(tmp_path, monkeypatch)
    assert run.log.text_path.read_text().count("Saving checkpoint") == 10


def test_a_process_has_its_device_and_says_why():
    ranks, device, reason = start_process("cpu", 0, 10.0, deterministic=False, exact=True)
    assert (ranks.world_size, device) == (1, CPU)
    assert reason.startswith("device: cpu")


def test_weights_of_the_former_run_may_be_what_a_new_one_starts_from(tmp_path):
    output = tmp_path / "out"
    run = start(output, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    run = start(output, f"--checkpoint={output}/iter_1.pt")
    with opened(run):
        pass
    (former,) = tmp_path.glob("out_*")
    assert (former / "iter_1.pt").is_file()


@pytest.mark.parametrize("flag", ["--data", "--val_images", "--val_annotations"])
def test_a_folder_with_an_input_of_the_run_stays(tmp_path, flag):
    (tmp_path / "best.pt").touch()
    run = start(tmp_path, f"{flag}={tmp_path}/file")
    with pytest.raises(UserError, match=r"this run reads .*/file, which is in it"), opened(run):
        pass
    run = start(tmp_path)
    files = Files("annotations.json", f"{tmp_path}/images", "plain")
    line = r"this run reads .*/images, which is in it"
    with pytest.raises(UserError, match=line), opened(run, [files]):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_every_rank_says_why_the_output_folder_cannot_be_used(tmp_path):
    """Else the others say that a rank was lost and that the run, which has not begun, goes on."""
    run = start(tmp_path)
    _, progress = parts_of(run)
    run.ranks = SimpleNamespace(
        main=False, barrier=lambda: None, from_main=lambda value: "the folder is full; free space"
    )
    line = r"^the folder is full; free space$"
    with pytest.raises(UserError, match=line), run.open_output(RECIPE, progress):
        pass
