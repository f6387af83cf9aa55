"""Throughput of a training run, measured on the host; `Meter.formula` is the rule.

The warm-up holds loader start, an NPU's compilation of operators, and autotuning.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

WARMUP_STEPS = 20


class Window(NamedTuple):
    """What happened between two calls of `Meter.window`."""

    steps: int
    time: float  # wall seconds a step, loader wait included
    data_time: float  # seconds a step spent waiting for the loader
    fps: float  # of this window
    fps_average: float  # of the run so far
    warming_up: bool  # fps_average still rests on warm-up steps


class Moment(NamedTuple):
    """A point of the run: steps done, and seconds since the start without pauses."""

    steps: int
    seconds: float


class Meter:
    """Counts steps against the wall clock, which starts here.

    `images_per_step` is batch size times world size. Steps are issued asynchronously: wait for
    the device (by reading losses) before `window` and `paused`, else work in flight is counted
    late or not at all.
    """

    def __init__(
        self,
        images_per_step: int,
        warmup_steps: int = WARMUP_STEPS,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.images_per_step = images_per_step
        self.warmup_steps = warmup_steps
        self.formula = (
            f"FPS = images of all ranks ({images_per_step} a step) / wall seconds, loader wait "
            "included, evaluation and checkpoint writing excluded; the average leaves out the "
            f"first {warmup_steps} steps (a shorter run counts them and is marked)"
        )
        self._clock = clock
        self._origin = clock()
        self._now = Moment(0, 0.0)  # the latest step or window
        self._warm = Moment(0, 0.0)  # the end of the warm-up
        self._window_start = Moment(0, 0.0)
        self._data_seconds = 0.0  # of this window

    @property
    def fps_average(self) -> float:
        """Images a second of the run up to the latest `step` or `window`; there must be one."""
        since = Moment(0, 0.0) if self._warming_up else self._warm
        return self._images_a_second(since)

    @property
    def _warming_up(self) -> bool:
        return self._now.steps <= self.warmup_steps

    def step(self, data_seconds: float) -> None:
        """Count one issued step, `data_seconds` of which were spent waiting for its batch."""
        self._data_seconds += data_seconds
        self._look_at_clock(steps=self._now.steps + 1)

    def window(self) -> Window:
        """Close the window that began at the last call (or at the start) and return it."""
        self._look_at_clock(steps=self._now.steps)  # now the device, too, has done these steps
        steps = self._now.steps - self._window_start.steps
        seconds = self._now.seconds - self._window_start.seconds
        window = Window(
            steps=steps,
            time=seconds / steps,
            data_time=self._data_seconds / steps,
            fps=self._images_a_second(self._window_start),
            fps_average=self.fps_average,
            warming_up=self._warming_up,
        )
        self._window_start = self._now
        self._data_seconds = 0.0
        return window

    def _images_a_second(self, since: Moment) -> float:
        steps = self._now.steps - since.steps
        return steps * self.images_per_step / (self._now.seconds - since.seconds)

    def _look_at_clock(self, steps: int) -> None:
        self._now = Moment(steps, self._clock() - self._origin)
        if steps == self.warmup_steps:
            self._warm = self._now

    def leave_out(self, seconds: float) -> None:
        """Leave out seconds of the current step, in which something else than training was done."""
        self._origin += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for evaluation or checkpoint writing; may be nested."""
        elapsed = self._clock() - self._origin
        try:
            yield
        finally:
            self._origin = self._clock() - elapsed
