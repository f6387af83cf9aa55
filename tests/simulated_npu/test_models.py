"""A training step of every model on the simulated NPU: the CPU's numbers, and nothing to wait for.

The CPU computes in the NPU path's way here: a whole batch at a time, contiguous tensors. What else
is particular to a model is in its own folder here.
"""

import importlib
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from common.npu.distributed import Ranks
from common.npu.precision import Precision
from tests.simulated_npu.audit import Audit
from tests.ssd_resnet34.conftest import tiny_train  # noqa: F401

pytestmark = pytest.mark.npu_sim
# Fields that make the network small.
SMALL = {
    "fcos": {"backbone": "resnet14", "channels": 64, "tower_convs": 1, "img_scale": ("64,107",)},
    "m2det": {"backbone": "vgg16_thin", "planes": 16, "num_levels": 2},
    "ssd_mmdet": {"width": 1 / 16},
    "ssd_resnet34": {"backbone": "resnet10"},
}
LIMITS = {"host_reads": 0, "data_dependent": 0, "blocking_copies": 0, "fallbacks": 0, "float64": 0}


@pytest.fixture(params=SMALL)
def model(request, monkeypatch):
    """The modules of a model, those that ask for the device's ways made to take the NPU's."""
    modules = {
        name: importlib.import_module(f"{request.param}.{name}")
        for name in ("augment", "config", "data", "loss", "train")
    }
    for module in modules.values():
        if hasattr(module, "images_at_once"):
            monkeypatch.setattr(module, "images_at_once", len)
        if hasattr(module, "memory_format"):
            monkeypatch.setattr(module, "memory_format", lambda device: torch.contiguous_format)
    recipe = next(iter(modules["config"].RECIPES.values()))
    recipe = replace(recipe, batch_size=2, **SMALL[request.param])
    return SimpleNamespace(name=request.param, recipe=recipe, **modules)


@pytest.fixture
def batches(model, tiny_train):  # noqa: F811
    """Five batches of two images with different numbers of boxes, one of them without any."""
    records = tiny_train
    if model.name == "fcos":  # batches of one orientation: their shape stays
        records = records.subset(model.data.orientation(records) == 1)
    found = list(model.data.build_loader(model.recipe, records, True, seed=2, end=5))
    found[3] = found[3]._replace(valid=torch.zeros_like(found[3].valid))
    return found


def start(model, device, records, level="O0", loss_scale="dynamic"):
    """A run before its first step."""
    torch.manual_seed(0)
    precision = Precision(device, level, loss_scale)
    log = SimpleNamespace(info=lambda *line: None)
    args = model.train.parse([])
    return model.train.Training(
        args, model.recipe, device, Ranks(), precision, log, records, records
    )


def test_steps_equal_the_cpus(npu, model, batches, tiny_train):  # noqa: F811
    results = []
    for device in (npu, torch.device("cpu")):
        run, losses = start(model, device, tiny_train), []
        for batch in batches[:3]:
            run.step(batch)
            losses.append(run.window.fetch().means())
        results.append((losses, [p.detach().cpu() for p in run.model.parameters()]))
    (losses, weights), (expected_losses, expected_weights) = results
    assert losses == expected_losses
    assert all(map(torch.equal, weights, expected_weights))


def test_a_steady_step_waits_for_nothing(npu, model, batches, tiny_train, record_property):  # noqa: F811
    run, audits = start(model, npu, tiny_train, "O1", "128"), []
    for batch in batches:
        pinned = {name: getattr(batch, name).pin_memory() for name in batch._fields[:-1]}
        with Audit() as audit:
            run.step(batch._replace(**pinned))
        audits.append(audit)
    title = f"{model.name}, a training step at {run.precision}"
    record_property("audit", f"{title}\n{audits[-1].table()}")
    for before, audit in pairwise(audits[1:]):
        assert audit.ops > 500
        assert audit.shapes <= before.shapes
        assert {name: getattr(audit, name).total() for name in LIMITS} == LIMITS
