"""Bad input and failing runs: one clear line, a non-zero exit, nothing lost."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.npu import checkpoint
from ssd_resnet34 import train
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import epoch_order
from ssd_resnet34.model import build_model
from tests import scripts

RUN = (*scripts.SMALL, "--max_iters=1", "--num_workers=0", "--kind=perf", "--log_interval=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=4, val=2)


def error_of(tmp_path, data, *flags) -> str:
    """The message of a run in this process that is refused."""
    with pytest.raises(UserError) as caught:
        train.main([*RUN, f"--data={data}", f"--output_dir={tmp_path}/run", *flags])
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_annotations(tmp_path, data, change) -> Path:
    """A changed copy of the training annotations."""
    content = json.loads((data / "annotations/instances_train2017.json").read_text())
    change(content)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return path


def test_missing_data_is_named_with_the_remedy(tmp_path):
    message = error_of(tmp_path, tmp_path / "nowhere")
    assert "nowhere: no such folder" in message
    assert "download_dataset.sh" in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("category_id", 12345, ["unknown category"]),
        ("bbox", [1, 2, float("nan"), 4], ["finite numbers"]),
        ("area", "large", ["area that is no number"]),
    ],
)
def test_a_bad_annotation_is_named_before_training(tmp_path, data, field, value, words):
    def change(content):
        content["annotations"][3][field] = value
        change.named = content["annotations"][3]

    path = with_annotations(tmp_path, data, change)
    message = error_of(tmp_path, data, f"--train_annotations={path}")
    named = [f"image {change.named['image_id']}", f"annotation {change.named['id']}"]
    assert all(word in message for word in [*words, *named])


def test_a_missing_image_file_is_named_before_training(tmp_path, data):
    def change(content):
        content["images"][0]["file_name"] = "gone.jpg"

    path = with_annotations(tmp_path, data, change)
    assert "gone.jpg" in error_of(tmp_path, data, f"--train_annotations={path}")


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path, data):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt", pickle_module=pickle)
    message = error_of(tmp_path, data, f"--checkpoint={tmp_path}/evil.pt")
    assert "evil.pt" in message
    assert not (tmp_path / "executed").exists()


def test_mismatching_checkpoints_are_refused(tmp_path, data):
    torch.save({"model": {"unrelated.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    assert "other.pt" in error_of(tmp_path, data, f"--checkpoint={tmp_path}/other.pt")
    recipe = replace(RECIPES["1p"], backbone="resnet10")
    state = {"model": build_model(recipe, 80).state_dict(), "recipe": asdict(recipe)}
    checkpoint.save(tmp_path / "weights.pt", state)
    message = error_of(tmp_path, data, f"--resume={tmp_path}/weights.pt")
    assert "--checkpoint_path" in message
    assert "does not exist" in error_of(tmp_path, data, "--resume=nothing.pt")


def test_impossible_flags(tmp_path, data):
    assert "--num_classes 5" in error_of(tmp_path, data, "--num-classes=5")
    assert "--loss_scale -1" in error_of(tmp_path, data, "--amp=O0", "--loss_scale=-1")
    assert "--output_dir" in error_of(tmp_path, data, "--output_dir=/dev/null/run")


def test_a_batch_size_of_0_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--batch-size=0"])
    assert "--batch_size 0: must be at least 1" in capsys.readouterr().err


def test_unknown_flags_end_with_one_line(tmp_path):
    done = scripts.run("train.py", "--no_such_flag=1", status=2)
    assert done.stderr.splitlines()[-1].startswith("error: unrecognized arguments: --no-such-flag")
    assert done.stdout == ""


@pytest.mark.slow
def test_divergence_stops_with_everything_named_and_no_bad_checkpoint(tmp_path, data):
    output = tmp_path / "run"
    where = (f"--data={data}", f"--output_dir={output}", "--save_interval=1")
    flags = ("--lr=1e30", "--lr_step=0", "--epochs=20", "--log_interval=2", "--num_workers=0")
    warm = ("--warmup=4", "--warmup_factor=0", "--evaluation")
    done = scripts.run("train.py", *scripts.SMALL, *where, *flags, *warm, status=1)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for word in ("not finite", "iteration", "rank 0", "learning rate", "images [", "--clip_norm"):
        assert word in line
    kept = scripts.checkpoints(output)
    assert kept
    assert f"iter_{kept[-1]}.pt" in line
    for step in kept:
        state = checkpoint.load(output / f"iter_{step}.pt")
        values = scripts.tensors(state).values()
        assert all(torch.isfinite(value).all() for value in values)


@pytest.mark.slow
def test_divergence_after_the_last_log_line_is_found_without_checkpoints_too(tmp_path):
    """Epochs of 6 steps, logged at 3 and 6: the rate of the seventh spoils the eighth, the last."""
    data = scripts.subset(tmp_path / "coco", train=12, val=2)
    where = (f"--data={data}", f"--output_dir={tmp_path}/run", "--num_workers=0", "--kind=perf")
    rate = ("--lr=1e-3", "--lr_step=0", "--lr_decay_epochs=1", "--lr_decay_factor=1e33")
    steps = ("--max_iters=8", "--log_interval=3", "--no-save")
    done = scripts.run("train.py", *scripts.SMALL, *where, *rate, *steps, status=1)
    assert "not finite, first at iteration 8 (epoch 2)" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_truncated_image_stops_training_with_a_checkpoint_of_that_step(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=8, val=2)
    victim = scripts.cut_short(data, int(epoch_order(8, 2, 1, seed=0, epoch=0)[5]))
    output = tmp_path / "run"
    where = (f"--data={data}", f"--output_dir={output}", "--num_workers=2", "--log_interval=1")
    done = scripts.run("train.py", *scripts.SMALL, *where, "--kind=perf", status=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert victim.name in last
    assert list(scripts.losses(output)) == [1, 2]  # position 5 is in the third step
    assert scripts.checkpoints(output) == [2]


@pytest.mark.slow
def test_check_data_lists_every_problem(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=4, val=2)
    where = (f"--data={data}", f"--output_dir={tmp_path}/run")
    done = scripts.run("train.py", *where, "--check_data")
    assert "0 errors" in done.stdout
    victim = sorted((data / "train2017").iterdir())[0]
    victim.unlink()
    victim.write_bytes(b"no image")
    name = data / "annotations/instances_val2017.json"
    content = json.loads(name.read_text())
    content["annotations"][0]["bbox"][2] = -5
    content["annotations"][1]["category_id"] = 999
    name.write_text(json.dumps(content))
    done = scripts.run("train.py", *where, "--check_data", status=1)
    for word in (victim.name, "negative", "unknown category: 1 "):
        assert word in done.stdout
    assert not (tmp_path / "run").exists()
