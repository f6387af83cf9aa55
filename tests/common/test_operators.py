"""The operators that stand for those of which CANN promises less: equal to torch's on a CPU."""

import pytest
import torch

from common.npu.operators import descending, first_max_by_comparison, largest, write_claims


@pytest.mark.parametrize("dim", [1, 2])
def test_the_first_of_equal_maxima_is_named(dim):
    values = torch.randint(4, (3, 7, 9), generator=torch.Generator().manual_seed(0)).float()
    found = first_max_by_comparison(values, dim)
    expected = values.max(dim=dim)
    assert torch.equal(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)


def test_descending_values_have_their_gradients():
    values = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]], requires_grad=True)
    ordered = descending(values)
    assert ordered.tolist() == [[3, 2, 1], [5, 0, -1]]
    (ordered * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [[100, 1, 10], [10, 100, 1]]


def test_the_largest_values_come_with_their_positions():
    values = torch.tensor([[[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]]])
    best, position = largest(values, 2)
    assert best.tolist() == [[[3, 2], [5, 0]]]
    assert position.tolist() == [[[1, 2], [2, 0]]]


def test_claims_that_count_are_written():
    claimed = torch.tensor([[4, 4, 0], [1, 2, 2]])
    claims = torch.tensor([[False, True, True], [True, False, False]])
    claimant = write_claims(claimed, claims, size=5)
    assert claimant.tolist() == [[2, -1, -1, -1, 1], [-1, 0, -1, -1, -1]]
    assert claimant.dtype == torch.int32
