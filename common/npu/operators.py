"""Operators that an NPU runs in another way: the same result everywhere, on its AI core.

Facts are those of CANN's public operator sources. An operator that the AI core cannot run goes to
the chip's AI CPU, and the stream waits for it.
"""

import functools

import torch
from torch import Tensor

from common.arithmetic import round_up

BLOCK_OF_INT32 = 8  # 32 bytes: an Ascend 910A may refuse rows that are no multiple of it


@functools.lru_cache(maxsize=None, typed=True)
def constant(value: float | tuple[float, ...], device: torch.device) -> Tensor:
    """Return a tensor of a number or of several that is made once: int64 of int, float32 of float.

    `torch.where` would make a tensor of a number in each call, which is a kernel of its own. It is
    made without a copy to the device, which would wait for it: compiled code does not remember it.
    """
    with torch.inference_mode(False):  # what is made in that mode cannot be trained with
        if isinstance(value, tuple):
            return torch.stack([torch.full((), number, device=device) for number in value])
        return torch.full((), value, device=device)


def first_max(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the largest values along a dimension and the positions (int64) of the first of equals.

    torch promises the first one on a CPU and on CUDA, CANN does not: there the position is worked
    out. The values are finite.
    """
    if values.device.type != "npu":
        largest, position = values.max(dim=dim)
        return largest, position
    return first_max_by_comparison(values, dim)


def first_max_by_comparison(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return what `first_max` does, whichever of equal values the device's operators name."""
    largest = values.amax(dim=dim, keepdim=True)
    size = values.shape[dim]
    # The earlier a position, the larger is its number, and none is 0.
    numbers = torch.arange(size, 0, -1, dtype=torch.int32, device=values.device)
    shape = [1] * values.ndim
    shape[dim] = size
    nothing = constant(0, values.device)
    number = torch.where(values == largest, numbers.view(shape), nothing).amax(dim=dim)
    return largest.squeeze(dim), (size - number).long()


def descending(values: Tensor) -> Tensor:
    """Return values (N, K) in descending order along the last dimension.

    Only the order is the sort's: an Ascend 910A sorts in half precision and gives its values so.
    """
    return values.gather(1, values.detach().argsort(dim=1, descending=True))


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values along the last dimension and their positions (int64).

    They come in descending order as the device sees it: an Ascend 910A compares in half precision.
    The values are exact.
    """
    position = values.topk(count, dim=-1).indices
    return values.gather(-1, position), position


def write_claims(claimed: Tensor, claims: Tensor, size: int) -> Tensor:
    """Return who claims each of `size` things, (N, size) int32, -1 where nobody does.

    Each of M claimants claims one thing: `claimed` (N, M) int64 are their positions, of which those
    count where `claims` (N, M) is true. No two that count claim the same thing, so the result does
    not depend on the order in which scatter writes.
    """
    num_rows, num_claimants = claimed.shape
    # The claims that do not count go to a column too many.
    columns = round_up(size + 1, BLOCK_OF_INT32)
    claimant = torch.arange(num_claimants, dtype=torch.int32, device=claimed.device)
    claimant = claimant.expand(num_rows, num_claimants)
    nobody = torch.full((num_rows, columns), -1, dtype=torch.int32, device=claimed.device)
    target = torch.where(claims, claimed, constant(size, claimed.device))
    return nobody.scatter(1, target, claimant)[:, :size]
