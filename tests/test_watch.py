"""The watch of the no-synchronisation tests sees what it is there to see."""

import pytest
import torch

from tests.watch import WaitError, Watch


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
