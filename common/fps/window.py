"""Loss terms of the steps since the last log line, kept on the device until they are wanted."""

from typing import NamedTuple

import torch
from torch import Tensor

from common.npu.overlap import HostCopy


class NotFinite(NamedTuple):
    """The first step of a window with a loss that is not finite."""

    step: int
    term: str
    image_ids: list[int]


class LossWindow:
    """Sums of named loss terms, and for each how many steps its sum stayed finite.

    `add` waits for nothing. `fetch` starts the copy to the host that `means` and `first_not_finite`
    wait for.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names = names
        self.steps = 0
        self._figures = torch.zeros(2, len(names), device=device)  # sums, steps with finite sums
        self._step_numbers: list[int] = []
        self._image_ids: list[Tensor] = []  # of each step, on the host

    def add(self, step: int, losses: dict[str, Tensor], image_ids: Tensor) -> None:
        """Add a step's terms (0-dim, on the device) and its image ids (on the host)."""
        sums, finite_steps = self._figures
        sums += torch.stack([losses[name].detach().float() for name in self.names])
        finite_steps += torch.isfinite(sums)  # a sum that is not finite stays so
        self._step_numbers.append(step)
        self._image_ids.append(image_ids)
        self.steps += 1

    def fetch(self) -> "LossWindow":
        """Start the copy to the host of what was added so far."""
        self._copy = HostCopy(self._figures)
        return self

    def means(self) -> dict[str, float]:
        """Return the mean of each term."""
        sums, _ = self._fetched()
        means = {}
        for name, total in zip(self.names, sums, strict=True):
            means[name] = total / self.steps
        return means

    def first_not_finite(self) -> NotFinite | None:
        """Return the first step with a loss that is not finite, None where all are.

        Of terms that fail in the same step it names the first: `names` have the total after its
        summands.
        """
        _, finite_steps = self._fetched()
        fewest = int(min(finite_steps))
        if fewest == self.steps:
            return None
        # Counted from the end: a resumed window has no images of its earliest steps.
        position = fewest - self.steps
        return NotFinite(
            step=self._step_numbers[position],
            term=self.names[finite_steps.index(fewest)],
            image_ids=self._image_ids[position].tolist(),
        )

    def _fetched(self) -> list[list[float]]:
        return self._copy.wait().tolist()

    def state_dict(self) -> dict:
        """Return what a resumed run needs to log the same means (waits for the device)."""
        return {"figures": self._figures.cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on with a saved window; one of another number of terms is left out."""
        if state["figures"].shape != self._figures.shape:
            return
        self._figures.copy_(state["figures"])
        self.steps = state["steps"]
