"""Loss terms of the steps since the last log line, kept on the device until they are wanted."""

import torch
from torch import Tensor

from common.npu.device import record_event


class LossWindow:
    """Sums of named loss terms, and for each the steps before its sum ceased to be finite.

    `add` waits for nothing. `fetch` starts the copy to the host that `means` and `bad` wait for.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names, self.device = names, device
        self.steps = 0
        self._images: list[tuple[int, Tensor]] = []  # iteration and image ids, on the host
        self._figures = torch.zeros(2, len(names), device=device)  # sums, steps with finite sums

    def add(self, step: int, losses: dict[str, Tensor], image_ids: Tensor) -> None:
        """Book a step's terms (0-dim, on the device) and its image ids (on the host)."""
        sums, good = self._figures
        sums += torch.stack([losses[name].detach().float() for name in self.names])
        good += torch.isfinite(sums)  # a sum that is not finite stays so
        self._images.append((step, image_ids))
        self.steps += 1

    def fetch(self) -> "LossWindow":
        self._copy = self._figures.to("cpu", non_blocking=True)
        self._copied = record_event(self.device)
        return self

    def means(self) -> dict[str, float]:
        """The mean of each term."""
        sums, _ = self._fetched()
        return {name: total / self.steps for name, total in zip(self.names, sums, strict=True)}

    def bad(self) -> tuple[int, str, list[int]] | None:
        """The first step with a loss that is not finite: iteration, term, image ids."""
        _, good = self._fetched()
        first = int(min(good))
        if first == self.steps:
            return None
        # Counted from the end: a resumed window has no images of its earliest steps.
        step, image_ids = self._images[first - self.steps]
        # Of equally early terms the first named: a part before the total that it spoils.
        return step, self.names[good.index(first)], image_ids.tolist()

    def _fetched(self) -> list[list[float]]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.tolist()

    def state_dict(self) -> dict:
        """What a resumed run needs to log the same means (waits for the device)."""
        return {"figures": self._figures.cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self._figures.copy_(state["figures"])
        self.steps = state["steps"]
