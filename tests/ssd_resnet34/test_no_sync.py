"""A training step neither waits for the device nor has shapes that depend on the data.

On a CPU nothing waits, but the operations that would are the same ones: a dispatch mode sees
each of them, those of the backward pass and of the optimizer too.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.npu.distributed import Ranks
from common.npu.precision import Precision
from ssd_resnet34 import augment, loss, train
from ssd_resnet34.data import build_loader, training_records

CPU = torch.device("cpu")
WAITS = {
    "aten::_local_scalar_dense": "item(), float(), bool(), int()",
    "aten::item": "item()",
    "aten::is_nonzero": "a tensor as a condition",
    "aten::equal": "torch.equal",
    "aten::nonzero": "nonzero",
    "aten::nonzero_numpy": "nonzero",
    "aten::argwhere": "argwhere",
    "aten::masked_select": "masked_select",
    "aten::_unique": "unique",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::bincount": "bincount",
    "aten::histc": "histc",
    "aten::repeat_interleave": "repeat_interleave by a tensor",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class WaitError(Exception):
    """An operation that makes the host wait for the device."""


class Watch(TorchDispatchMode):
    """Fails on operations that wait, but for the first `allowed` values read; notes all others."""

    def __init__(self, allowed=0):
        super().__init__()
        self.allowed, self.read, self.calls = allowed, 0, []

    def __enter__(self):
        # Read a CPU tensor without any operation: only their names can be watched.
        self._patches = ExitStack()
        for name in ("tolist", "numpy", "__array__"):
            patch = self._patches.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(torch.Tensor, name, self._refuse)
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    @staticmethod
    def _refuse(*args, **kwargs):
        raise WaitError("tolist(), numpy()")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name == "aten::_local_scalar_dense" and self.read < self.allowed:
            self.read += 1
        elif name in WAITS and not (name == "aten::repeat_interleave" and not tensors(args)):
            raise WaitError(WAITS[name])
        if name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1])):
            raise WaitError("indexing by a mask")
        given = ((x.dtype, *x.shape) for x in tensors((args, kwargs)))
        self.calls.append((func.name(), *given))
        return func(*args, **(kwargs or {}))


def tensors(value):
    """All tensors in nested arguments."""
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


CULPRITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "condition": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "index_put": lambda x: x.index_put((x > 0,), torch.ones(2)),
    "unique": lambda x: x.unique(),
    "unique dim": lambda x: x.unique(dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.long().abs().bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([1, 0, 2])),
    "backward": lambda x: InBackward.apply(x.requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_the_watch_sees(culprit):
    with pytest.raises(WaitError), Watch():
        CULPRITS[culprit](torch.tensor([1.0, -2.0, 3.0]))


def test_the_watch_lets_pass_what_does_not_wait():
    x = torch.tensor([1.0, -2.0, 3.0])
    with Watch() as watch:
        x[torch.tensor([0, 2])] + x.repeat_interleave(2)[:2]
        torch.where(x > 0, x, 0.0).masked_fill(x > 0, 1.0)
    assert ("aten::index.Tensor", (torch.float32, 3), (torch.int64, 2)) in watch.calls


@pytest.fixture(scope="module")
def batches(recipe, tiny_train):
    """Steps of two images with different numbers of boxes; the last has none."""
    records = training_records(tiny_train)
    recipe = replace(recipe, batch_size=2)
    found = list(build_loader(recipe, records, True, seed=2, end=3))
    found[2] = found[2]._replace(valid=torch.zeros_like(found[2].valid))
    assert len({batch.valid.sum().item() for batch in found}) == 3
    return found


def training(recipe, tiny_train, precision, **fields):
    recipe = replace(recipe, backbone="resnet18", batch_size=2, warmup=4, **fields)
    args = train.parse([])
    log = SimpleNamespace(info=lambda text: None)
    records = training_records(tiny_train)
    torch.manual_seed(0)
    return train.Training(args, recipe, CPU, Ranks(), precision, log, records, records, None)


def watched_steps(run, batches, allowed=0):
    """The operations of each step but the first, which makes the optimizer's state."""
    run.step(batches[0])
    calls = []
    for batch in batches[1:]:
        with Watch(allowed) as watch:
            run.step(batch)
        calls.append(watch.calls)
    assert run.iteration == len(batches)
    return calls


def assert_equal_steps(calls):
    """The same operations on the same shapes in the same order, whatever the boxes."""
    assert len(calls[0]) > 500
    for later in calls[1:]:
        assert Counter(later) == Counter(calls[0])
        assert later == calls[0]


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_a_step_waits_for_nothing(recipe, tiny_train, batches, level):
    run = training(recipe, tiny_train, Precision(CPU, level))
    calls = watched_steps(run, batches)
    assert_equal_steps(calls)
    names = {name for name, *_ in calls[0]}
    assert {"aten::convolution_backward", "aten::_fused_sgd_"} <= names
    inputs = {given[0][0] for name, *given in calls[0] if name == "aten::convolution"}
    assert inputs == {torch.bfloat16 if level == "O1" else torch.float32}


def test_a_step_with_static_scale_and_clipping_as_on_an_accelerator(
    recipe, tiny_train, batches, monkeypatch
):
    # There the whole batch goes through at once, and gradients are scaled.
    for module in (augment, loss):
        monkeypatch.setattr(module, "images_at_once", len)
    precision = Precision(CPU, "O1")
    precision.static_scale = 128.0
    run = training(recipe, tiny_train, precision, clip_norm=10.0)
    assert_equal_steps(watched_steps(run, batches))


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
def test_a_dynamic_scale_reads_one_flag_at_most(recipe, tiny_train, batches, clip_norm):
    precision = Precision(CPU)
    precision.scaler = torch.amp.GradScaler("cpu")
    run = training(recipe, tiny_train, precision, clip_norm=clip_norm)
    assert_equal_steps(watched_steps(run, batches, allowed=1))
