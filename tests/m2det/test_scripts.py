"""The launch scripts, end to end on real images: every file they promise, every flag."""

import json
import re
import shutil
from contextlib import ExitStack

import pytest

from tests import scripts

pytestmark = pytest.mark.slow
SMALL = ("--recipe=quickstart", "--device=cpu", "--amp=O0", "--num_workers=0", "--augment")


@pytest.fixture(scope="module", autouse=True)
def _own_scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "MODEL", scripts.ROOT / "m2det")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=16, val=4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run of train_full_8p.sh with 2 processes, and what it printed."""
    output = tmp_path_factory.mktemp("trained") / "8"
    flags = (f"--data_path={data}", f"--output_dir={output}", "--nproc_per_node=2")
    done = scripts.run("train_full_8p.sh", *flags, *SMALL, "--batch_size=2", "--max_iters=4")
    return output, done.stdout


def summary(folder, kind):
    (path,) = folder.glob(f"*_{kind}.log")
    return path.name, dict(line.split(" = ") for line in path.read_text().splitlines())


def test_full_training_leaves_every_file(trained):
    output, said = trained
    name, values = summary(output, "acc")
    assert name == "M2Det-thin_bs2_2p_acc.log"
    assert values["RankSize"] == "2"
    pictures = ("curves.png", "detections.png", "pr_curves.png", "confusion.png", "errors.png")
    for file in (*pictures, "analysis.json", "results.bbox.json", "best.pt"):
        assert (output / file).stat().st_size > 0, file
    assert scripts.checkpoints(output) == [4]
    log = (output / "train_2.log").read_text()
    for words in ("learning rate 0.02 after warm-up", "Epoch [1][2/4]\tlr:", "Epoch(val) [1][4]"):
        assert words in log
    for words in ("Final result", "Final Performance images/sec : ", "Final Train Accuracy : "):
        assert words in said


@pytest.mark.again
def test_the_320_preset_on_2_processes(data, tmp_path):
    flags = (f"--data_path={data}", f"--output_dir={tmp_path}/8", "--nproc_per_node=2")
    small = ("--recipe=320_vgg", "--backbone=vgg16_thin", "--batch_size=2", "--num_workers=0")
    small = (*small, "--device=cpu", "--amp=O0")
    more = ("--max_iters=2", "--no-save", "--clip_norm=10")  # weights are random here
    scripts.run("train_performance_8p.sh", *flags, *small, *more, timeout=800)
    name, values = summary(tmp_path / "8", "perf")
    assert name == "M2Det_bs2_2p_perf.log"
    assert 0 < float(values["ActualLoss"]) < 100


@pytest.mark.again
def test_evaluation_takes_the_newest_checkpoint_or_the_named_one(trained, data, tmp_path):
    output, _ = trained
    accuracy = summary(output, "acc")[1]["TrainAccuracy"]
    where = (f"--data_path={data}", "--nproc_per_node=2", "--device=cpu", "--num_workers=0")
    newest = scripts.run("train_eval_8p.sh", *where, f"--output_dir={output}")
    assert "iter_4.pt" in newest.stdout
    assert summary(output, "eval")[1]["TrainAccuracy"] == accuracy
    named = f"--checkpoint_path={output / 'best.pt'}"
    done = scripts.run("train_eval_8p.sh", *where, named, f"--output_dir={tmp_path}", "--per_class")
    assert summary(tmp_path, "eval")[1]["TrainAccuracy"] == accuracy
    assert re.search(r"^person +\d+ +\d\.\d{3} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("plus_one", [True, False])
def test_submission_rows_are_a_pixel_wider(trained, data, tmp_path, plus_one):
    output, _ = trained
    flags = (f"--data={data}", f"--checkpoint={output / 'best.pt'}", f"--output_dir={tmp_path}")
    more = ("--device=cpu", "--score_threshold=0.01", "--max_detections=3", "--format_only")
    scripts.run("evaluate.py", *flags, *more, "--plus_one" if plus_one else "--no_plus_one")
    rows = json.loads((tmp_path / "results.bbox.json").read_text())
    assert max(sum(r["image_id"] == row["image_id"] for r in rows) for row in rows) == 3
    least = min(min(row["bbox"][2:]) for row in rows)
    assert least >= 1 if plus_one else least >= 0


def test_performance_on_one_device_with_the_public_flags(data, tmp_path):
    flags = (f"--data_path={data}", f"--output_dir={tmp_path}/0", "--device_id=0", *SMALL)
    public = ("--batch-size=4", "--loss_scale=64", "--seed=3", "--lr=0.004", "--max_iters=2")
    scripts.run("train_performance_1p.sh", *flags, *public, "--sfam")
    name, values = summary(tmp_path / "0", "perf")
    assert name == "M2Det-thin_bs4_1p_perf.log"
    assert "TrainAccuracy" not in values
    assert not (tmp_path / "0" / "results.bbox.json").exists()


@pytest.mark.again
def test_8_processes(data, tmp_path):
    where = (f"--data_path={data}", f"--output_dir={tmp_path}/8")
    scripts.run(
        "train_performance_8p.sh", *where, *SMALL, "--batch_size=2", "--max_iters=2", timeout=600
    )
    assert summary(tmp_path / "8", "perf")[1]["RankSize"] == "8"
    assert scripts.checkpoints(tmp_path / "8") == [1]


def test_two_nodes(data, tmp_path):
    shared = (f"--data_path={data}", *SMALL, "--batch_size=2", "--max_iters=2")
    net = ("--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1", "--master_addr=127.0.0.1")
    port = f"--master_port={scripts.free_port()}"
    with ExitStack() as stack:
        nodes = []
        for node in (0, 1):
            own = (f"--node_rank={node}", f"--output_dir={tmp_path}/{node}")
            run = scripts.running("train_performance_multinodes.sh", *shared, *net, port, *own)
            nodes.append(stack.enter_context(run))
        assert [node.wait(400) for node in nodes] == [0, 0]
    assert summary(tmp_path / "0", "perf")[1]["RankSize"] == "2"


def test_finetuning_on_own_classes(trained, tmp_path):
    output, _ = trained
    data = scripts.subset(tmp_path / "own", train=4, val=2, classes=["cat", "hat", "bat"])
    where = (f"--data_path={data}", f"--output_dir={tmp_path}/run")
    # The checkpoint lies in the folder that makes room for the new run.
    shutil.copytree(output, tmp_path / "run")
    flags = (f"--pth_path={tmp_path}/run/best.pt", "--device_id=0", "--batch_size=2")
    cpu = ("--device=cpu", "--amp=O0", "--num_workers=0", "--max_iters=2")
    done = scripts.run("train_finetune_1p.sh", *where, *flags, *cpu)
    assert "1 classes of the same name keep their weights: cat" in done.stdout
    assert "2 initialised anew: hat, bat" in done.stdout
    assert "3 classes" in done.stdout
    assert "Final Performance images/sec" in done.stdout
    rows = json.loads((tmp_path / "run/results.bbox.json").read_text())
    assert {row["category_id"] for row in rows} <= {0, 7, 14}


@pytest.mark.again
def test_demo(trained, tmp_path):
    output, _ = trained
    (tmp_path / "images").mkdir()
    for photo in sorted((scripts.TINY / "val2017").iterdir())[:9]:  # more than a batch
        (tmp_path / "images" / photo.name).symlink_to(photo)
    flags = (f"--checkpoint_path={output / 'best.pt'}", "--device=cpu", "--min_score=0.01")
    done = scripts.run(
        "demo.sh", *flags, f"--img={tmp_path}/images", f"--show_dir={tmp_path}/drawn"
    )
    assert "9 of 9 images drawn" in done.stdout
    results = json.loads((tmp_path / "drawn" / "results.json").read_text())
    assert len(results) == 9
    assert len(list((tmp_path / "drawn").glob("*.jpg"))) == 9


def test_without_a_data_path_the_place_of_the_seed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = scripts.run("train_full_1p.sh", "--device=cpu", status=1)
    assert f"--data_path {tmp_path}/data/coco: no such folder" in done.stderr
