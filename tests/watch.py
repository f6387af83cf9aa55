"""A dispatch mode that fails on operations that make the host wait for the device.

On a CPU nothing waits, but the operations that would are the same ones: the mode sees each of
them, those of the backward pass and of the optimizer too.
"""

from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def watched_steps(loop, batches, allowed=0) -> list[list[tuple]]:
    """The operations of each step of a TrainingLoop but the first, which makes momenta.

    `allowed`: how many values each step may read.
    """
    loop.step(batches[0])
    calls = []
    for batch in batches[1:]:
        watch = Watch(allowed)
        loop.step(batch, watch)
        calls.append(watch.calls)
    return calls


def assert_equal_steps(calls: list[list[tuple]]) -> None:
    """The same operations on the same shapes in the same order, whatever the boxes."""
    assert len(calls[0]) > 500
    for later in calls[1:]:
        assert Counter(later) == Counter(calls[0])
        assert later == calls[0]
