"""The exponential moving average (EMA) of a network's weights, which is evaluated and used."""

import copy

import torch
from torch import Tensor, nn

from common.errors import UserError


class WeightAverage:
    """A copy of a network whose weights are averages over the steps of its training.

    `model` is the copy: what is evaluated. Averaged are the parameters that train and the floating
    buffers, which are the running statistics of batch norms; whatever else the network has, frozen
    parameters among it, belongs to both. With a `decay` of 0 there is no average: `model` is the
    network, and `update` does nothing.

    An update keeps min(decay, (1 + n) / (10 + n)) of the average, n being the number of updates
    before (the warm-up of TensorFlow's `tf.train.ExponentialMovingAverage`). So the average begins
    at once, and is one over the last ninth of the steps until `decay` is reached. The other usual
    warm-up, decay * (1 - exp(-n / 2000)), averages next to nothing in runs of a few thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.updates = 0
        self._weights: list[Tensor] = []
        self._averages: list[Tensor] = []
        if decay:
            self._copy_model(model)

    def _copy_model(self, model: nn.Module) -> None:
        copies = {}  # by the identity of the original, as `copy.deepcopy` notes them
        for tensor in [*model.parameters(), *model.buffers()]:
            changes = tensor.requires_grad or not isinstance(tensor, nn.Parameter)
            if changes and tensor.is_floating_point():
                self._weights.append(tensor)
            else:
                copies[id(tensor)] = tensor  # and is not copied
        self.model = copy.deepcopy(model, copies)
        self._averages = [copies[id(tensor)] for tensor in self._weights]
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights; call it after every step of the optimizer.

        Where a dynamic loss scale has skipped the step, that is towards the weights as they were.
        """
        if not self.decay:
            return
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - kept)
        self.updates += 1

    @torch.no_grad()
    def begin_again(self) -> None:
        """Begin with the weights as they are now."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.copy_(weight)
        self.updates = 0


def require_decay(decay: float) -> None:
    """Raise UserError for what cannot be the share of an average that an update keeps."""
    if not 0 <= decay < 1:
        raise UserError(
            f"--ema {decay:g}: not a number from 0 to below 1", "give 0.9998, or 0 for no average"
        )
