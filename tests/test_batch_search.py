"""`--batch_size auto` in the programs of all recipes, on real images."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.coco.index import read_index
from common.errors import UserError
from common.npu import batch_search, memory
from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from tests import limited_memory, scripts
from tests.small_models import MODELS, TFRECORD, module

NUM_IMAGES = 8
GIB = 2**30
SMALL = {
    "ssd_resnet34": ("--backbone=resnet10", "--threshold=0"),
    "ssd_mmdet": ("--width=0.0625", "--repeat=1"),
    "m2det": ("--recipe=quickstart",),
    "fcos": ("--recipe=quickstart", "--tower_convs=1", "--img_scale=96,160"),
}
SHORT = ("--device=cpu", "--amp=O0", "--seed=3", "--log_interval=1", "--save_interval=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight images for training and two for validation, as COCO files and as records."""
    folder = scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=NUM_IMAGES, val=2)
    annotations = folder / "annotations/instances_train2017.json"
    convert(folder / "train2017", annotations, folder / "records/train2017", 2)
    return folder


def flags_of(model, data, output, *words):
    """The flags of a short run of a small network on the images of a folder."""
    if model == TFRECORD:
        records = f"--training_file_pattern={data}/records/train2017*"
        small = ("--recipe=small", "--resnet_checkpoint=", "--mode=train", records)
    else:
        small = (*SMALL[model], f"--data={data}", "--num_workers=0", "--kind=perf")
    return [*small, *SHORT, f"--output_dir={output}", *map(str, words)]


def train(model, data, output, *words):
    module(model, "train").main(flags_of(model, data, output, *words))
    return next(output.glob("train_*.log")).read_text()


@pytest.fixture
def limit(monkeypatch):
    """`limit(model, most_images)`: a device that has memory for so many images."""

    def limit(model, most_images, error=limited_memory.FULL):
        program = module(model, "train")
        monkeypatch.setattr(program, "augment", program.augment)
        monkeypatch.setattr(batch_search, "in_host_memory", batch_search.in_host_memory)
        monkeypatch.setattr(memory, "memory_of", memory.memory_of)
        limited_memory.limit(program, most_images, error)

    return limit


@pytest.mark.parametrize(
    "model",
    [
        "ssd_mmdet",
        "fcos",
        *(
            pytest.param(name, marks=pytest.mark.again)
            for name in ("ssd_resnet34", "m2det", TFRECORD)
        ),
    ],
)
def test_a_run_with_the_batch_that_was_found_is_one_with_that_number(model, data, tmp_path, limit):
    limit(model, 3)
    log = train(model, data, tmp_path / "found", "--batch_size=auto", "--max_iters=2")
    # M2Det's batch norm needs two images at a time.
    found = 2 if model == "m2det" else 3
    assert f"--batch_size {found} is taken: a larger one would leave less than 10% of" in log
    assert "  batch 4: the memory is full\n" in log
    assert "  batch 2: " in log
    record = json.loads((tmp_path / "found/run.json").read_text())
    assert record["flags"]["batch_size"] == record["recipe"]["batch_size"] == found

    given = train(model, data, tmp_path / "given", f"--batch_size={found}", "--max_iters=2")
    assert "is taken" not in given
    assert scripts.losses(tmp_path / "found") == scripts.losses(tmp_path / "given")
    assert len(scripts.losses(tmp_path / "found")) == 2
    scripts.assert_same_state(tmp_path / "found/iter_2.pt", tmp_path / "given/iter_2.pt")


def test_a_kernel_that_lacks_memory_for_its_workspace_is_a_full_memory(data, tmp_path, limit):
    message = "GET was unable to find an engine to execute this computation"
    limit("ssd_mmdet", 1, RuntimeError(message))
    log = train("ssd_mmdet", data, tmp_path / "run", "--batch_size=auto", "--max_iters=1")
    assert "  batch 2: the memory is full\n" in log
    assert "--batch_size 1 is taken" in log
    # Without a smaller batch it may be a version of cuDNN that does not fit the device.
    limit("ssd_mmdet", 0, RuntimeError(message))
    with pytest.raises(RuntimeError, match=message):
        train("ssd_mmdet", data, tmp_path / "other", "--batch_size=auto")


def test_the_generators_of_random_numbers_are_put_back(data, tmp_path, limit, monkeypatch):
    limit("ssd_mmdet", 1)
    states = []
    find_batch_size = batch_search.find_batch_size

    def note_states(*arguments, **named):
        states.append(torch.get_rng_state())
        torch.rand(1)
        found = find_batch_size(*arguments, **named)
        states.append(torch.get_rng_state())
        return found

    monkeypatch.setattr(module("ssd_mmdet", "train"), "find_batch_size", note_states)
    train("ssd_mmdet", data, tmp_path / "run", "--batch_size=auto", "--max_iters=1")
    assert not torch.equal(*states)
    torch.set_rng_state(states[0])
    torch.rand(1)
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize(("model", "found"), [("ssd_resnet34", 6), ("m2det", 4)])
def test_the_batch_has_equal_parts(model, found, data, tmp_path, limit):
    limit(model, 7)
    words = ("--batch_size=auto", "--accumulate=2", "--max_iters=1")
    log = train(model, data, tmp_path / "run", *words)
    assert f"--batch_size {found} is taken" in log
    assert f"in 2 parts of {found // 2}" in log


def test_no_batch_fits(data, tmp_path, limit):
    limit("ssd_mmdet", 0)
    with pytest.raises(UserError, match=r"^--batch_size auto: a batch of 1 does not fit the mem"):
        train("ssd_mmdet", data, tmp_path / "run", "--batch_size=auto")
    assert not (tmp_path / "run").exists()


def test_a_share_of_the_images_at_most(data, tmp_path, limit):
    limit("ssd_mmdet", 100)
    words = ("--batch_size=auto", "--subset=5", "--max_iters=1")
    log = train("ssd_mmdet", data, tmp_path / "run", *words)
    assert "--batch_size 5 is taken: the training set has no more images for a rank; the" in log
    with pytest.raises(UserError, match=r"auto: 5 images are too few for 6 on each of 1 ranks"):
        train("ssd_mmdet", data, tmp_path / "other", *words, "--accumulate=6")


@pytest.mark.parametrize("model", MODELS)
def test_the_rate_follows_as_the_recipe_says(model, data, tmp_path, limit):
    limit(model, 2)
    log = train(model, data, tmp_path / "run", "--batch_size=auto", "--lr=0.01", "--max_iters=1")
    [line] = [line for line in log.splitlines() if "is taken" in line]
    if model == "m2det":
        assert line.endswith(
            "the global batch is 2 images, the learning rate 0.01, as with any batch"
        )
        return
    recipe = next(iter(module(model, "config").RECIPES.values()))
    if model == "fcos":
        recipe = module(model, "config").RECIPES["quickstart"]
    recipe = replace(recipe, lr=0.01)
    rate = recipe.base_lr(1, 2)
    usual = recipe.base_lr(1, recipe.batch_size)
    assert f"the learning rate {rate:g}, in proportion; {usual:g} with the recipe's" in line


# ---- on a CPU


@pytest.fixture
def always_rising(monkeypatch):
    """Larger batches count as faster, and steps as short, whatever else the machine does."""
    monkeypatch.setattr(batch_search, "RISE", 0.0)
    monkeypatch.setattr(batch_search, "LONGEST_TRY", float("inf"))
    monkeypatch.setattr(memory, "memory_of", lambda device, num_sharing: limited_memory.ROOMY)


def test_a_batch_that_may_not_fit_is_never_tried_on_a_cpu(
    data, tmp_path, monkeypatch, always_rising
):
    tried = []
    program = module("ssd_resnet34", "train")
    augment = program.augment

    def note_size(batch, recipe):
        tried.append(len(batch.images))
        return augment(batch, recipe)

    def peak_of_last_try(device):
        return (1 + tried[-1]) * GIB

    monkeypatch.setattr(program, "augment", note_size)
    monkeypatch.setattr(memory, "peak", peak_of_last_try)
    host = memory.Memory(total=9 * GIB, used=GIB, room=7 * GIB)
    monkeypatch.setattr(memory, "memory_of", lambda device, num_sharing: host)
    log = train("ssd_resnet34", data, tmp_path / "run", "--batch_size=auto", "--max_iters=1")
    assert "  batch 8: not tried, it would take about 9.00 GiB" in log
    assert "--batch_size 6 is taken: a larger one would leave less than 10% of the memory" in log
    assert set(tried) == {1, 2, 4, 6}


def test_the_search_ends_where_larger_batches_are_no_faster(data, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_search, "RISE", float("inf"))
    monkeypatch.setattr(batch_search, "LONGEST_TRY", float("inf"))
    monkeypatch.setattr(memory, "memory_of", lambda device, num_sharing: limited_memory.ROOMY)
    log = train("ssd_mmdet", data, tmp_path / "run", "--batch_size=auto", "--max_iters=1")
    assert "--batch_size 1 is taken: larger ones are no faster on this CPU" in log
    assert "  batch 4: " in log
    assert "  batch 8: " not in log


def test_the_memory_of_the_host_is_measured():
    device = torch.device("cpu")
    before = memory.memory_of(device, 1)
    assert 0 < before.used < before.total
    assert before.room < before.total
    memory.reset_peak(device)
    one = torch.ones(100 << 20, dtype=torch.uint8)
    del one
    first = memory.peak(device)
    two = torch.ones(200 << 20, dtype=torch.uint8)
    del two
    assert 90 << 20 < memory.peak(device) - first < 110 << 20
    memory.reset_peak(device)
    assert memory.peak(device) < first


def test_the_loaders_batches_count_on_a_cpu(data, tmp_path, always_rising, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda device: GIB)
    words = ("--batch_size=auto", "--max_iters=1", "--subset=1", "--num_workers=2")
    log = train("ssd_mmdet", data, tmp_path / "run", *words)
    # Two workers have four batches ready, of an image of 300 x 300 pixels and its boxes.
    used = GIB + 2 * 4 * 3 * 300 * 300
    assert f"  batch 1: {used / GIB:.2f} GiB" in log


# ---- resumed runs and several ranks


def test_a_resumed_run_keeps_its_global_batch(data, tmp_path, limit):
    limit("ssd_mmdet", 3)
    output = tmp_path / "run"
    train("ssd_mmdet", data, output, "--batch_size=2", "--max_iters=1")
    words = ("--batch_size=auto", "--resume=auto", "--max_iters=2")
    log = train("ssd_mmdet", data, output, *words)
    assert "--batch_size auto: 2, which is that of the resumed run" in log
    assert "global batch 2 (1 x 2)" in log
    assert "trying batches" not in log
    assert json.loads((output / "run.json").read_text())["flags"]["batch_size"] == 2


def test_a_resumed_run_of_m2det_has_two_images_for_batch_norm(data, tmp_path):
    output = tmp_path / "run"
    train("m2det", data, output, "--batch_size=2", "--max_iters=1")
    words = ("--batch_size=auto", "--resume=auto", "--accumulate=2", "--max_iters=2")
    with pytest.raises(UserError, match=r"^--batch_size=2, --accumulate=2: BN on the 1 x 1 map"):
        train("m2det", data, output, *words)


def test_a_resumed_run_of_records_needs_images_for_one_step(data, tmp_path):
    output = tmp_path / "run"
    train(TFRECORD, data, output, "--batch_size=2", "--max_iters=1")
    words = ("--batch_size=auto", "--resume=auto", "--num_examples_per_epoch=1")
    with pytest.raises(UserError, match=r"^--num_examples_per_epoch is less than one step's"):
        train(TFRECORD, data, output, *words)


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("fcos", ()),
        pytest.param("ssd_resnet34", ("--sync_bn",), marks=pytest.mark.again),
    ],
)
def test_all_ranks_take_what_fits_each_of_them(model, more, data, tmp_path):
    """The loss of fcos and batch norm have means over ranks, for which none may wait in vain."""
    output = tmp_path / "run"
    environment = {
        **scripts.environment(),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        limited_memory.MODEL: model,
        limited_memory.MOST_IMAGES: "4,1",
    }
    port = scripts.free_port()
    where = ("--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    program = Path(limited_memory.__file__)
    short = ("--batch_size=auto", "--max_iters=1", "--timeout=120")
    words = flags_of(model, data, output, *short, *more)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *where, program, *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = (output / "train_0.log").read_text()
    assert "  batch 2: the memory is full" in log
    assert "--batch_size 1 is taken" in log
    assert "global batch 2 (2 x 1)" in log


# ---- flags


def test_other_words_than_auto_are_refused(data, tmp_path, capsys):
    for words in (["--batch_size=many"], ["--batch_size=0"], ["--batch_size", "2.5"]):
        with pytest.raises(SystemExit):
            train("ssd_mmdet", data, tmp_path / "run", *words)
    errors = capsys.readouterr().err
    assert "argument --batch-size/-b: 'many': give a number or 'auto'" in errors
    assert "--batch_size 0: must be at least 1" in errors
    with pytest.raises(SystemExit):
        module("ssd_mmdet", "evaluate").main([f"--data={data}", "--batch_size=auto"])
    assert "invalid int value: 'auto'" in capsys.readouterr().err
    words = ["--validation_file_pattern=records", "--val_json_file=a.json", "--batch_size=auto"]
    with pytest.raises(UserError, match=r"^--batch_size auto: only training finds a batch size"):
        module(TFRECORD, "evaluate").main(words)
    with pytest.raises(UserError, match=r"^--batch_size auto: --look and --replay draw batches"):
        train("ssd_mmdet", data, tmp_path / "run", "--batch_size=auto", "--look=1")


@pytest.mark.parametrize("shapes", ["two", "exact"])
def test_kernels_of_fcos_are_chosen_as_in_its_run(shapes, data, tmp_path, monkeypatch):
    chosen = []

    def note_choice(batch, recipe):
        chosen.append(torch.backends.cudnn.benchmark)
        raise UserError("seen")

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(module("fcos", "train"), "augment", note_choice)
    with pytest.raises(UserError, match="seen"):
        train("fcos", data, tmp_path / "run", "--batch_size=auto", f"--shapes={shapes}")
    assert chosen == [shapes == "two"]


@pytest.mark.parametrize("shapes", ["two", "exact", "square"])
@pytest.mark.parametrize("scales", [("96,160",), ("64,160", "96,128")])
def test_no_batch_of_fcos_is_larger_than_the_one_that_is_tried(shapes, scales, data):
    recipe = module("fcos", "config").Recipe(shapes=shapes, img_scale=scales, batch_size=2)
    records = read_index(f"{data}/annotations/instances_train2017.json", f"{data}/train2017")
    program = module("fcos", "data")
    largest = program.largest_sample(recipe, records)
    height, width = largest.images.shape[1:3]
    for batch in program.build_loader(recipe, records, training=True, end=12):
        assert batch.images[0].numel() <= largest.images.numel()
        assert batch.boxes.shape[1] == largest.boxes.shape[1]
    expected = {
        ("two", 1): 96 * 160,
        ("exact", 1): 96 * 160,
        ("square", 1): 160 * 160,
        ("two", 2): 160 * 160,
        ("exact", 2): 96 * 160,
        ("square", 2): 160 * 160,
    }
    assert height * width == expected[shapes, len(scales)]
