"""A training step outside of a run: what `--batch_size auto` and `--find_lr` do with a network."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.npu.accumulation import Accumulation
from common.npu.device import get_random_state, set_random_state
from common.npu.precision import Precision, set_learning_rate
from common.npu.run import Run


class TrialStep(NamedTuple):
    """The parts of a training step as `train.py` of a model makes it, in the same order."""

    recipe: Any
    precision: Precision
    augment: Callable
    network: nn.Module
    criterion: Callable
    accumulation: Accumulation
    optimizer: Optimizer

    def do(self, batch: Any, rate: float) -> Tensor:
        """Do a step on a batch, which is on the device; return its loss (0-dim, on the device)."""
        images, boxes = self.augment(batch, self.recipe)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        for part in self.accumulation.parts(images, boxes, batch.labels, batch.valid):
            with self.precision.autocast():
                outputs = self.network(part.images)
            losses = self.criterion(outputs, part.boxes, part.labels, part.valid, part.normaliser)
            self.precision.backward(losses["loss"], self.optimizer)
            self.accumulation.add(losses)
        clip_each = getattr(self.recipe, "clip_each", 0.0)  # that of m2det
        self.precision.step(self.optimizer, self.recipe.clip_norm, clip_each)
        return self.accumulation.losses["loss"].detach()

    def forget(self) -> None:
        """Release the gradients and losses of the last step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.accumulation.losses = {}


def step_alone(
    run: Run,
    recipe: Any,
    augment: Callable,
    model: nn.Module,
    detection_loss: nn.Module,
    optimizer: Optimizer,
) -> TrialStep:
    """Return the step of one rank, before its network becomes parallel; nothing is compiled."""
    network, optimizer = run.precision.prepare(model, optimizer)
    accumulation = Accumulation(run.settings.accumulate, network, False, detection_loss.normaliser)
    return TrialStep(
        recipe, run.precision, augment, network, detection_loss, accumulation, optimizer
    )


class Snapshot:
    """A copy, in the memory of the host, of all that training steps change.

    That are the weights and buffers of a network, what its optimizer has gathered, its rates, the
    loss scale, and the random generators.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, precision: Precision):
        self.optimizer = optimizer
        self.precision = precision
        tensors = [*model.parameters(), *model.buffers()]
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        self._tensors = tensors
        self._copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._scaler = precision.scaler.state_dict()
        self._device_random = get_random_state(precision.device)
        self._random = (torch.get_rng_state(), np.random.get_state(), random.getstate())

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit by bit."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.precision.scaler.load_state_dict(self._scaler)
        of_torch, of_numpy, of_python = self._random
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        set_random_state(self.precision.device, self._device_random)
