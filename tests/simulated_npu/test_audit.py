"""The audit sees every bad habit it is there for, and no other."""

import pytest
import torch

from tests.simulated_npu.audit import Audit

pytestmark = pytest.mark.npu_sim


class ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


HABITS = {
    "item": ("host_reads", lambda x: x.sum().item()),
    "float": ("host_reads", lambda x: float(x.sum())),
    "condition": ("host_reads", lambda x: 1 if x.sum() > 0 else 2),
    "tolist": ("host_reads", lambda x: x.tolist()),
    "cpu": ("host_reads", lambda x: x.cpu()),
    "copy to host": ("host_reads", lambda x: torch.zeros(3).copy_(x)),
    "equal": ("host_reads", lambda x: torch.equal(x, x + 1)),
    "in backward": (
        "host_reads",
        lambda x: ReadInBackward.apply(x.clone().requires_grad_()).sum().backward(),
    ),
    "nonzero": ("data_dependent", lambda x: (x > 0).nonzero()),
    "where": ("data_dependent", lambda x: torch.where(x > 0)),
    "mask": ("data_dependent", lambda x: x[x > 0]),
    "assignment by mask": ("data_dependent", lambda x: x.clone().__setitem__(x > 0, 1.0)),
    "masked_select": ("data_dependent", lambda x: x.masked_select(x > 0)),
    "unique": ("data_dependent", lambda x: x.unique()),
    "bincount": ("data_dependent", lambda x: x.long().abs().bincount()),
    "to": ("blocking_copies", lambda x: torch.ones(3).to(x.device)),
    "copy": ("blocking_copies", lambda x: x.clone().copy_(torch.ones(3))),
    "tensor": ("blocking_copies", lambda x: torch.tensor([1.0, 2.0], device=x.device)),
    "double": ("float64", lambda x: x.double()),
    "double zeros": ("float64", lambda x: torch.zeros(2, dtype=torch.float64, device=x.device)),
    "cast": ("casts", lambda x: x.half()),
    "scatter of int64": (
        "ai_cpu",
        lambda x: torch.zeros(8, device=x.device).long().scatter(0, x.long().abs(), 1),
    ),
    "scatter into odd rows": (
        "ai_cpu",
        lambda x: torch.zeros(9, device=x.device).scatter(0, x.long().abs(), 1.0),
    ),
    "scatter_add along the first dimension": (
        "ai_cpu",
        lambda x: torch.zeros(9, 1, device=x.device).scatter_add(
            0, x.long().abs()[:, None], x[:, None]
        ),
    ),
    "sort of whole numbers": ("ai_cpu", lambda x: x.int().sort()),
    "count": ("ai_cpu", lambda x: (x > 0).sum()),
    "maximum of int64": ("ai_cpu", lambda x: x.long().amax()),
    "division of int64": ("ai_cpu", lambda x: x.long() // 2),
    "rearrangement": ("rearranged", lambda x: x.expand(2, 3).t().contiguous()),
}


@pytest.mark.parametrize("habit", HABITS)
def test_the_audit_sees(npu, habit):
    field, act = HABITS[habit]
    x = torch.tensor([1.0, -2.0, 3.0]).to(npu)
    with Audit() as audit:
        act(x)
    assert getattr(audit, field), audit.table()


def test_an_operator_without_kernel_is_seen_and_refused(npu):
    x = torch.ones(3).to(npu)
    with Audit() as audit, pytest.raises(RuntimeError, match="bessel"):
        torch.special.bessel_j0(x)
    assert audit.fallbacks


def test_good_work_passes(npu):
    x = torch.tensor([1.0, -2.0, 3.0]).to(npu)
    index = torch.tensor([0, 2]).to(npu)
    ones = torch.ones(3).pin_memory()
    audits = []
    for _ in range(2):
        with Audit() as audit:
            y = ones.to(npu, non_blocking=True) + x
            torch.where(y > 0, y, 0.0).masked_fill(x > 0, 1.0).topk(2)[0] + y[index]
        audits.append(audit)
        for field in (
            "host_reads", "data_dependent", "blocking_copies", "fallbacks", "float64", "casts",
        ):  # fmt: skip
            assert not getattr(audit, field), audit.table()
    assert audits[1].shapes == audits[0].shapes
    assert audits[0].kernels["aten::topk"] == 1
