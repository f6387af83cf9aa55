"""Throughput of a training run, measured on the host; `Meter.formula` is the rule.

The warm-up holds loader start, compilation and autotuning.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Window(NamedTuple):
    """What happened between two calls of `Meter.window`."""

    steps: int
    time: float  # wall seconds a step, loader wait included
    data_time: float  # seconds a step spent waiting for the loader
    fps: float  # of this window
    fps_average: float  # of the run so far
    warming_up: bool  # fps_average still rests on warm-up steps


class Meter:
    """Counts steps against the wall clock, which starts here.

    `images_per_step` is batch size times world size. Steps are issued asynchronously: wait for
    the device (by reading losses) before `window` and `paused`, else work in flight is booked
    late or not at all.
    """

    def __init__(self, images_per_step: int, warmup_steps: int = 20, clock=time.perf_counter):
        self.images_per_step, self.warmup_steps, self._clock = images_per_step, warmup_steps, clock
        self._origin = clock()
        self._steps = 0
        self._now = 0.0  # run seconds, pauses left out, at the latest step or window
        self._warm = self._last = (0, 0.0)  # steps, seconds when warm-up ended, this window began
        self._data_seconds = 0.0  # of this window
        self.formula = (
            f"FPS = images of all ranks ({images_per_step} a step) / wall seconds, loader wait "
            "included, evaluation and checkpoint writing excluded; the average leaves out the "
            f"first {warmup_steps} steps (a shorter run counts them and is marked)"
        )

    @property
    def fps_average(self) -> float:
        """Images a second of the run up to the latest `step` or `window`, of which there is one."""
        steps, since = self._warm if self._steps > self.warmup_steps else (0, 0.0)
        return (self._steps - steps) * self.images_per_step / (self._now - since)

    def step(self, data_seconds: float) -> None:
        """Book one issued step, `data_seconds` of which were spent waiting for its batch."""
        self._steps += 1
        self._data_seconds += data_seconds
        self._look()

    def window(self) -> Window:
        """Close the window that began at the last call (or at the start) and report it."""
        self._look()  # now the device, too, has done these steps
        steps, seconds = self._steps - self._last[0], self._now - self._last[1]
        data_time, fps = self._data_seconds / steps, steps * self.images_per_step / seconds
        self._last, self._data_seconds = (self._steps, self._now), 0.0
        warming_up = self._steps <= self.warmup_steps
        return Window(steps, seconds / steps, data_time, fps, self.fps_average, warming_up)

    def _look(self) -> None:
        self._now = self._clock() - self._origin
        if self._steps == self.warmup_steps:
            self._warm = self._steps, self._now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for evaluation or checkpoint writing; may be nested."""
        elapsed = self._clock() - self._origin
        try:
            yield
        finally:
            self._origin = self._clock() - elapsed
