"""A run's start, its state and the course of its steps, without a model of the product."""

from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import flags
from common.errors import UserError
from common.fps.progress import Progress
from common.npu import checkpoint
from common.npu.precision import build_sgd
from common.npu.run import Run, RunState, start_process

CPU = torch.device("cpu")
LOSSES = ("loss_cls", "loss")


@dataclass(frozen=True)
class Recipe:
    name: str = "tiny"
    batch_size: int = 2
    epochs: int = 3
    evaluation: tuple[int, ...] = (1,)
    threshold: float = 0.5
    amp: str = "O0"
    loss_scale: str = "dynamic"

    def lr_at(self, iteration, iters_per_epoch, world_size, batch_size):
        return 0.1 / (1 + iteration)

    def listing(self):
        return str(asdict(self))


class Records(list):
    class_names = ("cat", "hat")
    category_ids = (3, 7)


RECIPE = Recipe()
RECORDS = Records(range(8))  # four steps an epoch
REMEDY = "lower --lr"


def start(folder, *words, recipe=RECIPE):
    parser = flags.make_parser("Train.", *flags.TRAINING_GROUPS)
    words = [f"--output_dir={folder}", "--device=cpu", "--log_interval=1", *words]
    return Run.start(parser.parse_args(words), recipe)


def parts_of(run, recipe=RECIPE, width=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    optimizer = build_sgd(list(model.parameters()), CPU, lr=0.1, momentum=0.9)
    progress = Progress(run, recipe, LOSSES, 4, recipe.epochs * 4, REMEDY)
    identity = {"width": width}
    state = RunState(run, model, optimizer, progress, recipe, RECORDS, RECORDS, identity)
    return state, progress


def train(run, state, progress, batches=None, evaluate=lambda: None):
    """A loop as the models have it."""
    batches = batches or [torch.full((2, 2), float(k)) for k in range(progress.end)]
    with run.open_output(RECIPE):
        progress.begin(len(RECORDS), 2, "rate 0.1")
        for step, batch in progress.steps(batches[progress.steps_done :]):
            state.optimizer.zero_grad()
            loss = state.model(batch).square().sum() + batch.sum()
            loss.backward()
            state.optimizer.step()
            progress.add(step, {"loss_cls": loss, "loss": loss}, torch.tensor([10, 11]))
            if progress.checkpoint_due():
                state.save()
            if progress.evaluation_due():
                evaluate()
        if progress.interrupted:
            state.save()
            return progress.exit_status()
        progress.finish()
    return None


def evaluation(ap):
    metrics = {"bbox_mAP": ap, "bbox_mAP_50": ap, "bbox_mAP_75": ap}
    return SimpleNamespace(stats={"AP": ap}, mmdet=lambda: metrics)


def test_nothing_is_written_before_the_output_is_opened(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("of a former run")
    run = start(tmp_path / "run")
    state, progress = parts_of(run)
    state.restore()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "old"]
    train(run, state, progress)
    (moved,) = tmp_path.glob("run_*")
    assert (moved / "old").read_text() == "of a former run"
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
    (tmp_path / "run" / "old").write_text("of a former run")
    file = tmp_path / "first" / "iter_1.pt"
    second = start(tmp_path / "run", "--kind=perf", "--max_iters=2", f"--resume={file}")
    state, progress = parts_of(second)
    state.restore()
    train(second, state, progress)
    (moved,) = tmp_path.glob("run_*")
    assert (moved / "old").read_text() == "of a former run"
    assert file.exists()
    assert checkpoint.load(tmp_path / "run" / "iter_2.pt")["iteration"] == 2


@pytest.mark.parametrize(
    ("words", "width", "message"),
    [
        (["--seed=5"], 3, "its seed was 0, now 5"),
        ([], 4, "its width was 3, now 4"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, words, width, message):
    run = start(tmp_path, "--max_iters=1", "--kind=perf")
    train(run, *parts_of(run))
    resumed = start(tmp_path, "--resume=auto", *words)
    state, _ = parts_of(resumed, width=width)
    with pytest.raises(UserError, match=rf"iter_1\.pt: {message}; go on as it was, or start anew"):
        state.restore()


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    run = start(tmp_path, "--kind=perf", "--save_interval=1")
    state, progress = parts_of(run)
    batches = [torch.ones(2, 2), torch.ones(2, 2), torch.full((2, 2), float("nan"))]
    with pytest.raises(UserError) as error:
        train(run, state, progress, batches)
    message = str(error.value)
    assert message.startswith("loss_cls is not finite, first at iteration 2 (epoch 1) on rank 0")
    assert "images [10, 11]" in message
    assert f"last good checkpoint: {tmp_path}/iter_2.pt; lower --lr" in message


def test_an_evaluation_is_due_after_its_epochs_and_at_the_end(tmp_path):
    run = start(tmp_path)
    state, progress = parts_of(run)
    evaluated = []

    def evaluate():
        evaluated.append(progress.steps_done)
        # A state of this step is there already: a run that ends in its evaluation repeats it.
        assert (tmp_path / f"iter_{progress.steps_done}.pt").exists()
        assert progress.add_evaluation(evaluation(0.1 * len(evaluated)))
        assert not progress.evaluation_due()

    train(run, state, progress, evaluate=evaluate)
    assert evaluated == [4, 12]
    assert "TrainAccuracy = 0.20000" in (tmp_path / "tiny_bs2_1p_acc.log").read_text()


def test_a_goal_ends_the_run(tmp_path):
    run = start(tmp_path)
    state, progress = parts_of(run)
    train(run, state, progress, evaluate=lambda: progress.add_evaluation(evaluation(0.5)))
    assert progress.steps_done == 4
    assert "AP goal 0.5 reached: training ends here" in run.log.text_path.read_text()


def test_a_worse_evaluation_is_not_the_best(tmp_path):
    run = start(tmp_path)
    _, progress = parts_of(run)
    run.log.open(tmp_path, 0)
    progress.steps_done = 4
    assert progress.add_evaluation(evaluation(0.2))
    assert not progress.add_evaluation(evaluation(0.1))
    assert (progress.best_ap, progress.last_ap) == (0.2, 0.1)


def test_bad_data_ends_the_run_with_a_checkpoint(tmp_path):
    def batches():
        yield torch.ones(2, 2)
        raise UserError("a.jpg: cannot read the image")

    class Loader:
        def __getitem__(self, key):
            return batches()

    run = start(tmp_path, "--kind=perf")
    state, progress = parts_of(run)
    with pytest.raises(UserError, match=r"^a\.jpg: cannot read the image$"):
        train(run, state, progress, Loader())
    assert [path.name for path in checkpoint.checkpoints_newest_first(tmp_path)] == ["iter_1.pt"]


def test_log_lines_begin_anew_with_every_epoch(tmp_path):
    run = start(tmp_path)
    run.settings = SimpleNamespace(max_iters=0, log_interval=3)
    progress = Progress(run, RECIPE, LOSSES, 7, 21, REMEDY)
    assert [step for step in range(1, 22) if progress.log_due(step)] == [3, 6, 10, 13, 17, 20]
    whole = Progress(run, RECIPE, LOSSES, 7, 21, REMEDY, log_period=21)
    assert [step for step in range(1, 22) if whole.log_due(step)] == [3, 6, 9, 12, 15, 18, 21]


def test_a_process_has_its_device_and_says_why():
    ranks, device, reason = start_process("cpu", 0, 10.0, deterministic=False)
    assert (ranks.world_size, device) == (1, CPU)
    assert reason.startswith("device: cpu")
