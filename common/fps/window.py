"""Loss terms of the steps since the last log line, kept on the device until they are wanted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.npu.device import record_event


@dataclass(frozen=True)
class NonFinite:
    """The first step whose loss was not finite, and what was in it."""

    step: int  # 0-based iteration of the run
    term: str
    image_ids: list[int]


class LossWindow:
    """Sums of named loss terms, and for each the first step at which it was not finite.

    `add` issues a few device operations and waits for nothing.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names, self.device = names, device
        self.clear()

    def clear(self) -> None:
        self.images: list[tuple[int, Tensor]] = []  # step and image ids, on the host
        self.restored = 0  # steps of this window before the process was resumed
        self._sums = torch.zeros(len(self.names), device=self.device)
        self._first = torch.full((len(self.names),), -1.0, device=self.device)
        self._position = torch.zeros((), device=self.device)

    @property
    def steps(self) -> int:
        return self.restored + len(self.images)

    def add(self, step: int, losses: dict[str, Tensor], image_ids: Tensor) -> None:
        """Book a step's terms (0-dim, on the device) and its image ids (on the host)."""
        values = torch.stack([losses[name].detach().float() for name in self.names])
        new = (self._first < 0) & ~torch.isfinite(values)
        self._first = torch.where(new, self._position, self._first)
        self._sums += values
        self._position += 1
        self.images.append((step, image_ids))

    def close(self) -> "ClosedWindow":
        """Start the copy of what was booked to the host, and a new window."""
        closed = self._copy()
        self.clear()
        return closed

    def peek(self) -> NonFinite | None:
        """The first step of the open window that went wrong (waits for the device)."""
        return self._copy().bad()

    def _copy(self) -> "ClosedWindow":
        figures = torch.cat([self._sums, self._first]).to("cpu", non_blocking=True)
        event = record_event(self.device)
        return ClosedWindow(self.names, self.steps, self.images, figures, event)

    def state_dict(self) -> dict:
        """What a resumed run needs to log the same means (waits for the device)."""
        return {"sums": self._sums.cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self._sums.copy_(state["sums"])
        self.restored = state["steps"]


@dataclass(frozen=True)
class ClosedWindow:
    """A window on its way to the host."""

    names: tuple[str, ...]
    steps: int
    images: list[tuple[int, Tensor]]
    figures: Tensor
    event: object | None

    def means(self) -> dict[str, float]:
        """The mean of each term; waits for the copy."""
        sums, _ = self._figures()
        return {name: total / self.steps for name, total in zip(self.names, sums, strict=True)}

    def bad(self) -> NonFinite | None:
        """The first step that went wrong, if one did; waits for the copy."""
        _, firsts = self._figures()
        # Of equally early terms the first named: a part before the total that it spoils.
        bad = [(first, k) for k, first in enumerate(firsts) if first >= 0]
        if not bad:
            return None
        position, term = min(bad)
        step, image_ids = self.images[int(position)]
        return NonFinite(step, self.names[term], image_ids.tolist())

    def _figures(self) -> list[list[float]]:
        if self.event is not None:
            self.event.synchronize()
        return self.figures.view(2, -1).tolist()
