"""A training step and an evaluation of every recipe on the simulated NPU: the CPU's numbers, and
nothing to wait for.

The CPU computes in the NPU path's way here: a whole batch at a time, contiguous tensors. What else
is particular to a model is in its own folder here.
"""

import importlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.loop import TrainingLoop
from common.npu.distributed import Ranks
from common.npu.precision import Precision
from tests.scripts import TINY
from tests.simulated_npu.audit import Audit

pytestmark = [pytest.mark.npu_sim, pytest.mark.every_version]
TFRECORD = "ssd_resnet34.tfrecord"
SHARDS = Path(__file__).parents[1] / "golden/ssd_resnet34_tfrecord/train2017*"  # 6 records
# Recipes, and fields that make the network small.
RECIPE = {
    "fcos": "gn", "m2det": "320_vgg", "ssd_mmdet": "1p", "ssd_resnet34": "1p", TFRECORD: "port",
}  # fmt: skip
SMALL = {
    "fcos": {"backbone": "resnet14", "channels": 64, "tower_convs": 1, "img_scale": ("64,107",)},
    # Its batch norms need two images at a time, in a part as well.
    "m2det": {"backbone": "vgg16_thin", "planes": 16, "num_levels": 2, "batch_size": 4},
    "ssd_mmdet": {"width": 1 / 16},
    "ssd_resnet34": {"backbone": "resnet10"},
    TFRECORD: {"backbone": "resnet10"},
}
# Scores that some hundred boxes of a network without training have.
EVALUATION = {
    "fcos": {"score_threshold": 0.011, "eval_shapes": "two"},
    "ssd_mmdet": {"score_threshold": 0.2},
    "ssd_resnet34": {"score_threshold": 0.03},
    TFRECORD: {"score_threshold": 0.03},
}
# What a training step must not ask of an NPU.
LIMITS = dict.fromkeys(
    ("host_reads", "data_dependent", "blocking_copies", "fallbacks", "ai_cpu", "float64"), 0
)


@pytest.fixture(params=SMALL)
def model(request, monkeypatch):
    """The modules of a recipe, those that ask for the device's ways made to take the NPU's."""
    modules = {
        name: importlib.import_module(f"{request.param}.{name}")
        for name in ("augment", "config", "data", "evaluate", "loss", "train")
    }
    shared = importlib.import_module("ssd_resnet34.data")  # normalises images of TFRecords too
    for module in (*modules.values(), shared):
        if hasattr(module, "chunk_size"):
            monkeypatch.setattr(module, "chunk_size", len)
        if hasattr(module, "memory_format"):
            monkeypatch.setattr(module, "memory_format", lambda device: torch.contiguous_format)
    recipe = modules["config"].RECIPES[RECIPE[request.param]]
    recipe = replace(recipe, **{"batch_size": 2, **SMALL[request.param]})
    return SimpleNamespace(name=request.param, recipe=recipe, **modules)


def records_of_shards():
    """Six records, of images of different sizes."""
    return importlib.import_module(f"{TFRECORD}.index").read_index(str(SHARDS), "flag")


@pytest.fixture
def batches(model, tiny_train):
    """Five batches of images with different numbers of boxes, one of them without any."""
    records = tiny_train
    if model.name == "fcos":  # batches of one orientation: their shape stays
        records = records.subset(model.data.orientation_groups(records)[1])
    if model.name == TFRECORD:
        records = model.data.training_records(records_of_shards())
    found = list(model.data.build_loader(model.recipe, records, True, seed=2, end=5))
    found[3] = found[3]._replace(valid=torch.zeros_like(found[3].valid))
    return found


@pytest.fixture
def evaluated(model, tiny_val):
    """Two sets of four images of one shape to evaluate on."""
    if model.name == TFRECORD:
        records = records_of_shards()
        return [records.subset(np.arange(6) < 4), records.subset(np.arange(6) >= 2)]
    landscape = np.flatnonzero(tiny_val.sizes[:, 0] < tiny_val.sizes[:, 1])
    return [tiny_val.subset(landscape[:4]), tiny_val.subset(landscape[4:8])]


def start(model, device, level="O0", loss_scale="dynamic", flags_of_step=()):
    """A run before its first step."""
    flags = [f"--data={TINY}", "--kind=perf"]
    if model.name == TFRECORD:
        flags = [f"--training_file_pattern={SHARDS}", "--mode=train"]
    flags += [f"--device={device.type}", *flags_of_step]
    return TrainingLoop(model.train, model.recipe, flags, Precision(device, level, loss_scale))


@pytest.mark.usefixtures("sgd_of_the_npu")
def test_steps_equal_the_cpus(npu, model, batches):
    results = []
    for device in (npu, torch.device("cpu")):
        with start(model, device) as loop:
            losses = [loop.step(batch) for batch in batches[:3]]
            weights = [p.detach().cpu() for p in loop.state.model.parameters()]
        results.append((losses, weights))
    (losses, weights), (expected_losses, expected_weights) = results
    assert losses == expected_losses
    assert all(map(torch.equal, weights, expected_weights))


@pytest.mark.parametrize("flags", [(), ("--accumulate=2", "--ema=0.99")], ids=["plain", "with all"])
def test_a_steady_step_waits_for_nothing(npu, model, batches, flags, record_property):
    audits = []
    with start(model, npu, "O1", "128", flags) as loop:
        for batch in batches:
            pinned = {name: getattr(batch, name).pin_memory() for name in batch._fields[:-1]}
            audit = Audit()
            loop.step(batch._replace(**pinned), audit)
            audits.append(audit)
        words = [model.name, *flags]
        title = f"{' '.join(words)}, a training step at {loop.state.run.precision}"
    record_property("audit", f"{title}\n{audits[-1].table()}")
    for before, audit in pairwise(audits[1:]):
        assert audit.ops > 500
        assert audit.shapes <= before.shapes
        assert {name: getattr(audit, name).total() for name in LIMITS} == LIMITS, audit.table()


def test_an_evaluation_waits_for_nothing_but_its_results(npu, model, evaluated, record_property):
    recipe = replace(model.recipe, eval_batch_size=2, **EVALUATION.get(model.name, {}))
    torch.manual_seed(0)
    network, audits, found = model.train.build_model(recipe, 80), [], []
    if model.name == "m2det":  # untrained, it finds something everywhere: make that rare
        for layer in (*network.loc, *network.conf):
            layer.weight.data *= 0.01
        for layer in network.conf:
            layer.bias.data.view(-1, 81)[:, 0] += 12  # background
    for device in (torch.device("cpu"), npu):
        network.to(device)
        for records in evaluated:
            with Audit() as audit:
                args = recipe, records, device, Ranks(), 0
                found.append(model.evaluate.detect_all(network, *args))
            audits.append(audit)
    for one, other in zip(found[:2], found[2:], strict=True):
        assert len(one)
        assert np.array_equal(one, other)
    before, audit = audits[2:]
    record_property("audit", f"{model.name}, an evaluation of two batches\n{audit.table()}")
    assert audit.shapes <= before.shapes
    assert audit.host_reads == {"copy to host": 2}, audit.table()  # one a batch, none waited for
    for name in ("blocking_copies", "data_dependent", "fallbacks", "float64"):
        assert not getattr(audit, name), audit.table()
