"""Several ranks: evaluation counts each image once, averages BN statistics, and ends together."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from common.coco.index import read_index
from common.npu import checkpoint, distributed
from common.npu.distributed import Ranks
from ssd_resnet34.augment import augment
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import build_loader, epoch_order, training_records
from ssd_resnet34.loss import DetectionLoss
from ssd_resnet34.model import build_model
from tests import scripts

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


@pytest.mark.again
def test_8_ranks_and_any_batch_size_evaluate_to_the_single_process_result(trained, tmp_path):
    single, said = evaluate(trained, tmp_path / "1", "--eval_batch_size=1")
    assert len({row["image_id"] for row in single}) == 50
    assert len(coco_lines(said)) == 12
    seven, said_seven = evaluate(trained, tmp_path / "7", "--eval_batch_size=7")
    eight, said_eight = evaluate(trained, tmp_path / "8", "--eval_batch_size=3", ranks=8)
    assert seven == single
    assert eight == single
    assert coco_lines(said) == coco_lines(said_seven) == coco_lines(said_eight)


@pytest.mark.again
def test_2_ranks_go_on_together_while_metrics_are_computed(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=8, val=4)
    output = tmp_path / "run"
    flags = ("--epochs=2", "--evaluation=1,2", "--background_metrics", "--log_interval=1")
    where = (f"--data={data}", f"--output_dir={output}", "--num_workers=0")
    scripts.run("train.py", *scripts.SMALL, *where, *flags, ranks=2)
    val_lines = [line for line in scripts.json_lines(output) if line.get("mode") == "val"]
    assert [line["steps_done"] for line in val_lines] == [2, 4]
    assert scripts.checkpoints(output) == [2, 4]
    assert (output / "best.pt").exists()
    assert not (output / "evaluated.pt").exists()


def test_statistics_are_averaged_and_weights_equal_on_2_ranks(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=8, val=4)
    output = tmp_path / "run"
    flags = ("--max_iters=2", "--log_interval=1", "--num_workers=0", "--save_interval=1")
    where = (f"--data={data}", f"--output_dir={output}")
    scripts.run("train.py", *scripts.SMALL, *where, *flags, ranks=2)
    before = checkpoint.load(output / "iter_1.pt")  # in mid-epoch: each rank has its own
    after = checkpoint.load(output / "best.pt")  # evaluated: averaged
    names = [name for name in before["model"] if name.endswith("running_mean")]
    for name in names:
        own = [buffers[name] for buffers in before["buffers"]]
        assert not torch.equal(*own)
        assert torch.equal(before["model"][name], torch.stack(own).mean(0))
        assert torch.equal(*[buffers[name] for buffers in after["buffers"]])
        assert torch.equal(after["model"][name], after["buffers"][0][name])


def first_gradients(data, ranks, batch_size):
    """Loss and gradients of this rank's first batch, BN frozen, parallel as in training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = replace(RECIPES["1p"], backbone="resnet10", batch_size=batch_size)
    files = data / "annotations/instances_train2017.json", data / "train2017"
    records = training_records(read_index(*map(str, files)))
    batch = next(iter(build_loader(recipe, records, True, ranks=ranks)))
    model = build_model(recipe, 80).eval()
    network = model
    if ranks.world_size > 1:
        network = distributed.parallel(model, None)
    images, boxes = augment(batch, recipe)
    losses = DetectionLoss(recipe, 80)(network(images), boxes, batch.labels, batch.valid)
    losses["loss"].backward()
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    return losses["loss"].item(), batch.image_ids.tolist(), gradients


def member(data, rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    ranks = Ranks(rank, rank, 2, 2)
    distributed.start(torch.device("cpu"), ranks, timeout_seconds=100)
    queue.put((rank, first_gradients(data, ranks, 2)))
    ranks.barrier()
    torch.distributed.destroy_process_group()


def test_2_ranks_of_2_images_have_the_gradient_of_1_rank_with_4(tmp_path):
    """Augmented real images; BN frozen, for its statistics are those of a rank's own batch."""
    data = scripts.subset(tmp_path / "coco", train=8, val=2)
    context, port = multiprocessing.get_context("spawn"), scripts.free_port()
    queue = context.Queue()
    members = [context.Process(target=member, args=(data, r, port, queue)) for r in (0, 1)]
    for process in members:
        process.start()
    found = dict(queue.get(timeout=300) for _ in members)
    for process in members:
        process.join(60)
        assert process.exitcode == 0
    loss, image_ids, gradients = first_gradients(data, Ranks(), 4)
    assert [image_ids[0::2], image_ids[1::2]] == [found[0][1], found[1][1]]
    assert loss == pytest.approx((found[0][0] + found[1][0]) / 2, rel=1e-5)
    for name, expected in gradients.items():
        scale = np.abs(expected).max()
        np.testing.assert_array_equal(found[0][2][name], found[1][2][name])
        np.testing.assert_allclose(
            found[0][2][name], expected, rtol=1e-3, atol=1e-4 * scale, err_msg=name
        )


def test_bad_data_on_one_rank_ends_both_with_its_message_and_a_checkpoint(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=8, val=2)
    # Two ranks take turns: position 5 is in the second step, of rank 1.
    victim = scripts.cut_short(data, int(epoch_order(8, 2, 2, seed=0, epoch=0)[5]))
    output = tmp_path / "run"
    flags = ("--max_iters=4", "--log_interval=1", "--num_workers=1", "--kind=perf")
    where = (f"--data={data}", f"--output_dir={output}", "--save_interval=1000")
    done = scripts.run("train.py", *scripts.SMALL, *where, *flags, ranks=2, status=None)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error (rank")]
    assert told
    assert all(victim.name in line and "re-download" in line for line in told)
    assert list(scripts.losses(output)) == [1]
    assert scripts.checkpoints(output) == [1]
    # Put right, the run goes on where it was.
    shutil.copy(scripts.TINY / "train2017" / victim.name, victim)
    scripts.run("train.py", *scripts.SMALL, *where, *flags, "--resume=auto", ranks=2)
    assert list(scripts.losses(output)) == [1, 2, 3, 4]


def test_kill_9_of_one_rank_ends_the_other(tmp_path, capsys):
    data = scripts.subset(tmp_path / "coco", train=8, val=2)
    output = tmp_path / "run"
    flags = ("--epochs=500", "--log_interval=1", "--num_workers=1", "--kind=perf")
    where = (f"--data={data}", f"--output_dir={output}", "--save_interval=2")
    with scripts.running("train.py", *scripts.SMALL, *where, *flags, ranks=2) as process:
        scripts.wait_for_step(output, 3, process)
        everyone = scripts.family(process.pid)
        os.kill(scripts.children(process.pid)[-1], signal.SIGKILL)
        assert scripts.ended(process, everyone, seconds=60) != 0
    assert checkpoint.load_newest(output)["iteration"] > 0
    assert capsys.readouterr().err == ""
