"""A batch that goes through the network in parts, whose gradients add up to those of the whole."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

from torch import Tensor, nn

from common.errors import UserError
from common.npu.sync_bn import SyncBatchNorm2d


class Part(NamedTuple):
    """Images that go through the network together, with their ground truth."""

    images: Tensor  # (N, 3, H, W)
    boxes: Tensor  # (N, M, 4)
    labels: Tensor  # (N, M)
    valid: Tensor  # (N, M) bool
    normaliser: object  # of the whole batch, as the loss takes it; None: this is the whole batch


class Accumulation:
    """Splits batches into `count` parts and adds up their losses.

    `normaliser` is a loss's function that returns what sums over the whole batch are divided by. So
    losses and gradients are those of the whole batch, but for the rounding of fp32 and for batch
    norm, which sees a part at a time. The ranks of a network that `is_parallel` exchange gradients
    in the last part alone.
    """

    def __init__(
        self,
        count: int,
        network: nn.Module,
        is_parallel: bool,
        normaliser: Callable[..., object],
    ):
        self.count = count
        self.network = network
        self.is_parallel = is_parallel
        self.normaliser = normaliser
        self.losses: dict[str, Tensor] = {}  # of the present batch, 0-dim

    def parts(self, images: Tensor, boxes: Tensor, labels: Tensor, valid: Tensor) -> Iterator[Part]:
        """Yield the parts of a batch; `add` must follow the backward pass of each."""
        self.losses = {}
        if self.count == 1:
            yield Part(images, boxes, labels, valid, None)
            return
        normaliser = self.normaliser(images, boxes, labels, valid)
        size = len(images) // self.count
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            is_last = first + size == len(images)
            keeps_gradients = self.is_parallel and not is_last
            with self.network.no_sync() if keeps_gradients else nullcontext():
                yield Part(images[part], boxes[part], labels[part], valid[part], normaliser)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses (0-dim) of a part to those of the batch."""
        if self.count == 1:
            self.losses = losses
            return
        for name, loss in losses.items():
            loss = loss.detach()
            if name in self.losses:
                loss = self.losses[name] + loss
            self.losses[name] = loss


def require_equal_parts(batch_size: int, count: int) -> None:
    """Raise UserError where a batch has no `count` equal parts, which keep the shapes fixed."""
    if batch_size % count:
        divisors = [str(n) for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise UserError(
            f"--accumulate {count}: does not divide --batch_size {batch_size}",
            f"give one of {', '.join(divisors)}",
        )


def more_parts(batch_size: int, count: int, least: int) -> list[str]:
    """Return the flag of the next larger number of equal parts as a list, which may be empty.

    A part has `least` images at least.
    """
    for larger in range(count + 1, batch_size // least + 1):
        if batch_size % larger == 0:
            return [f"--accumulate={larger}"]
    return []


def description(model: nn.Module, batch_size: int, count: int) -> str:
    """Return a line that says what the parts of a batch are, and what batch norm sees of them."""
    size = batch_size // count
    text = f"--accumulate {count}: a batch goes through the network in {count} parts of {size}"
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.training:
            whose = " of each process" if isinstance(module, SyncBatchNorm2d) else ""
            return f"{text}; batch norm sees {size} images{whose} at a time"
    return text
