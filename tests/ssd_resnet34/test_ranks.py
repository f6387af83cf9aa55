"""Several ranks: evaluation counts each image once, averages BN statistics, and ends together."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace

import pytest
import torch

from common.npu import checkpoint
from ssd_resnet34.config import RECIPES
from ssd_resnet34.model import build_model
from tests.ssd_resnet34 import scripts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with 80 classes whose scores pass the threshold here and there."""
    torch.manual_seed(0)
    recipe = replace(RECIPES["1p"], backbone="resnet10")
    model = build_model(recipe, 80)
    content = json.loads((scripts.TINY / "annotations/instances_val2017.json").read_text())
    classes = [category["name"] for category in content["categories"]]
    path = tmp_path_factory.mktemp("checkpoint") / "iter_1.pt"
    state = {"model": model.state_dict(), "classes": classes, "recipe": asdict(recipe)}
    checkpoint.save(path, state)
    return path


def evaluate(trained, output, *flags, ranks=1):
    common = (f"--data={scripts.TINY}", f"--checkpoint={trained}", f"--output_dir={output}")
    more = ("--device=cpu", "--num_workers=0", "--max_per_class=20", "--max_detections=50")
    done = scripts.run("evaluate.py", *common, *more, *flags, ranks=ranks)
    return json.loads((output / "results.bbox.json").read_text()), done.stdout


def coco_lines(stdout):
    return [line for line in stdout.splitlines() if "@[ IoU=" in line]


def test_8_ranks_and_any_batch_size_evaluate_to_the_single_process_result(trained, tmp_path):
    single, said = evaluate(trained, tmp_path / "1", "--eval_batch_size=1")
    assert len({row["image_id"] for row in single}) == 50
    assert len(coco_lines(said)) == 12
    seven, said_seven = evaluate(trained, tmp_path / "7", "--eval_batch_size=7")
    eight, said_eight = evaluate(trained, tmp_path / "8", "--eval_batch_size=3", ranks=8)
    assert seven == single
    assert eight == single
    assert coco_lines(said) == coco_lines(said_seven) == coco_lines(said_eight)


def test_statistics_are_averaged_and_weights_equal_on_2_ranks(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=8, val=4)
    output = tmp_path / "run"
    flags = ("--max_iters=2", "--log_interval=1", "--num_workers=0", "--save_interval=1")
    where = (f"--data={data}", f"--output_dir={output}")
    scripts.run("train.py", *scripts.SMALL, *where, *flags, ranks=2)
    before = checkpoint.load(output / "iter_1.pt")  # in mid-epoch: each rank has its own
    after = checkpoint.load(output / "iter_2.pt")  # the last one is evaluated: averaged
    names = [name for name in before["model"] if name.endswith("running_mean")]
    for name in names:
        own = [buffers[name] for buffers in before["buffers"]]
        assert not torch.equal(*own)
        assert torch.equal(before["model"][name], torch.stack(own).mean(0))
        assert torch.equal(*[buffers[name] for buffers in after["buffers"]])
        assert torch.equal(after["model"][name], after["buffers"][0][name])
    assert (output / "best.pt").exists()


def test_2_ranks_see_together_what_1_rank_sees(tmp_path):
    """The first step's loss is the mean over the same images (BN differs, by batch, a little)."""
    data = scripts.subset(tmp_path / "coco", train=8, val=2)
    first = {}
    for ranks, batch in ((1, 4), (2, 2)):
        output = tmp_path / f"run{ranks}"
        where = (f"--data={data}", f"--output_dir={output}", f"--batch_size={batch}")
        flags = ("--max_iters=2", "--log_interval=1", "--num_workers=0", "--kind=perf")
        scripts.run("train.py", *scripts.SMALL, *where, *flags, ranks=ranks)
        first[ranks] = scripts.losses(output)[1]
        state = checkpoint.load(output / "iter_2.pt")
        assert state["run"]["global batch"] == 4
    assert first[1][2] == pytest.approx(first[2][2], rel=0.15)
    assert first[1][3] == first[2][3]


def test_bad_data_on_one_rank_ends_both_with_its_message_and_a_checkpoint(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=8, val=2)
    victim = sorted((data / "train2017").iterdir())[0]
    whole = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "run"
    flags = ("--max_iters=40", "--log_interval=1", "--num_workers=1", "--kind=perf")
    where = (f"--data={data}", f"--output_dir={output}", "--save_interval=1000")
    done = scripts.run("train.py", *scripts.SMALL, *where, *flags, ranks=2, status=None)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error (rank")]
    assert victim.name in line
    assert "re-download" in line
    logged = scripts.losses(output)
    assert scripts.checkpoints(output) == [max(logged, default=0)]
    # Put right, the run goes on where it was.
    shutil.copy(scripts.TINY / "train2017" / victim.name, victim)
    more = (*flags, "--resume=auto", f"--max_iters={max(logged, default=0) + 2}")
    scripts.run("train.py", *scripts.SMALL, *where, *more, ranks=2)


def test_kill_9_of_one_rank_ends_the_other(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=8, val=2)
    output = tmp_path / "run"
    flags = ("--epochs=500", "--log_interval=1", "--num_workers=0", "--kind=perf")
    where = (f"--data={data}", f"--output_dir={output}", "--save_interval=2")
    process = scripts.start("train.py", *scripts.SMALL, *where, *flags, ranks=2)
    scripts.wait_for_step(output, 3, process)
    os.kill(scripts.children(process.pid)[-1], signal.SIGKILL)
    assert process.wait(60) != 0
    assert scripts.checkpoints(output)
