"""`--cache ram` in the programs of all models: the same batches, from memory."""

import os

import pytest
import torch
from torch.utils.data import DataLoader

from common.coco import images
from common.coco.index import read_index
from common.npu.distributed import Ranks
from common.npu.file_cache import filled_cache
from ssd_mmdet.data import build_loader
from ssd_resnet34.tfrecord import index as record_index
from tests import scripts, test_own_data
from tests.small_models import ALL, MODELS, TFRECORD, module, small_recipe
from tests.test_own_data import SHORT, SMALL, save, write

GOLDEN_RECORDS = scripts.ROOT / "tests/golden/ssd_resnet34_tfrecord/train2017*"


def fill(reader):
    reader.cache = filled_cache(reader.extents(), Ranks(), lambda: False, print)


def no_file(*_):
    raise AssertionError("a file is read")


@pytest.fixture
def mixed(tmp_path):
    """Photographs turned by EXIF, stored upright, and a PNG."""
    entries, boxes = test_own_data.entries(6)
    entries[5]["file_name"] = "6.png"
    folder = write(tmp_path / "data", entries, boxes)
    for number, orientation in enumerate([None, 6, 3, None, 6], 1):
        save(tmp_path / f"data/train2017/{number}.jpg", orientation)
    save(tmp_path / "data/train2017/6.png")
    return read_index(f"{folder}/annotations/instances_train2017.json", f"{folder}/train2017")


@pytest.mark.parametrize("model", MODELS)
def test_batches_are_the_same_of_all_kinds_of_files(model, mixed):
    data = module(model, "data")
    batches = []
    for cached in (False, True):
        loader = data.build_loader(small_recipe(model), mixed, training=True, end=4)
        if cached:
            fill(loader.dataset.reader)
        batches.append(list(loader))
        turned = loader.dataset.reader.is_turned
    assert turned.any()
    for plain, from_memory in zip(*batches, strict=True):
        for name, value in plain._asdict().items():
            assert torch.equal(value, getattr(from_memory, name)), name


def test_a_worker_that_is_not_forked_gets_the_memory_with_its_data_set(mixed):
    loader = build_loader(small_recipe("ssd_mmdet"), mixed, training=True, end=2)
    expected = list(loader)
    fill(loader.dataset.reader)
    for i in range(len(mixed)):
        os.unlink(mixed.path(i))
    loader = DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    for plain, from_memory in zip(expected, loader, strict=True):
        assert torch.equal(plain.images, from_memory.images)


@pytest.mark.parametrize("model", ALL)
def test_a_run_reads_no_file_after_it_has_begun_and_is_the_same(model, tmp_path, monkeypatch):
    words = [*SHORT, "--subset=4", "--save_interval=1", "--seed=1"]
    if model == TFRECORD:
        words += ["--recipe=small", f"--training_file_pattern={GOLDEN_RECORDS}", "--mode=train"]
    else:
        data = scripts.subset(tmp_path / "data", train=8, val=2, classes=["person", "dog"])
        words += [*SMALL[model], f"--data={data}", "--kind=perf", "--repeat=2", "--balance=1"]
    train = module(model, "train").main
    train([*words, f"--output_dir={tmp_path}/plain"])
    monkeypatch.setattr(images, "_read_bytes", no_file)
    monkeypatch.setattr(record_index, "read_record", no_file)
    train([*words, f"--output_dir={tmp_path}/cached", "--cache=ram"])
    log = (tmp_path / "cached/train_0.log").read_text()
    assert "--cache ram: 4 images" in log
    scripts.assert_same_state(tmp_path / "plain/iter_2.pt", tmp_path / "cached/iter_2.pt")


@pytest.mark.parametrize("model", MODELS)
def test_a_single_batch_that_is_repeated_needs_no_cache(model, tmp_path):
    data = scripts.subset(tmp_path / "data", train=8, val=2)
    words = [*SMALL[model], *SHORT, f"--data={data}", "--kind=perf", f"--output_dir={tmp_path}/run"]
    module(model, "train").main([*words, "--cache=ram", "--fake_input"])
    log = (tmp_path / "run/train_0.log").read_text()
    assert "--cache ram" not in log
