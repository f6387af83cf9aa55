"""Throughput of a training run, measured on the host; the device is never touched or waited for.

FPS = images of all ranks / wall seconds. The seconds include the wait for the loader; evaluation
and checkpoint writing are left out by stopping the clock (`Meter.paused`). The run's average
leaves out the first `warmup_steps` steps (loader start, compilation, autotuning); while nothing
else has been measured, the warm-up steps themselves count and the figure is marked as such.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """What happened between two calls of `Meter.window`."""

    steps: int
    seconds: float
    time: float  # wall seconds a step, loader wait included
    data_time: float  # seconds a step spent waiting for the loader
    fps: float  # of this window
    fps_average: float  # of the run so far
    warming_up: bool  # fps_average still rests on warm-up steps
    data_share: float  # part of the window spent waiting for the loader, 0..1


class Meter:
    """Counts steps against the wall clock; make it right before the loop, the clock starts here.

    `images_per_step` is the batch size times the world size. Steps are issued asynchronously:
    wait for the device (by fetching the losses) before `window` and `paused`, else work in
    flight is booked late or not at all.
    """

    def __init__(
        self,
        images_per_step: int,
        warmup_steps: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.images_per_step = images_per_step
        self.warmup_steps = warmup_steps
        self._clock = clock
        self._origin = clock()
        self._steps = 0
        self._now = 0.0  # run seconds, pauses left out, at the latest step or window
        self._warm_at = 0.0  # the same when the warm-up ended
        self._window_steps = 0  # steps before this window
        self._window_began = 0.0
        self._window_data = 0.0

    @property
    def formula(self) -> str:
        """The rule, to be written beside the figures."""
        return (
            f"FPS = images of all ranks ({self.images_per_step} a step) / wall seconds, loader "
            f"wait included, evaluation and checkpoint writing excluded; the average leaves out "
            f"the first {self.warmup_steps} steps (a shorter run counts them and is marked)"
        )

    @property
    def warming_up(self) -> bool:
        """Whether no step after the warm-up has been measured yet."""
        return self._steps <= self.warmup_steps

    @property
    def fps_average(self) -> float:
        """Images a second of the run up to the latest `step` or `window`; 0 before the first."""
        if self._steps == 0:
            return 0.0
        if self.warming_up:
            return self._steps * self.images_per_step / self._now
        measured = self._steps - self.warmup_steps
        return measured * self.images_per_step / (self._now - self._warm_at)

    def step(self, data_seconds: float) -> None:
        """Book one issued step, `data_seconds` of which were spent waiting for its batch."""
        self._now = self._clock() - self._origin
        self._steps += 1
        self._window_data += data_seconds
        if self._steps == self.warmup_steps:
            self._warm_at = self._now

    def window(self) -> Window:
        """Close the window that began at the last call (or at the start) and report it."""
        steps = self._steps - self._window_steps
        if steps == 0:
            raise ValueError("window() needs at least one step() since the last window")
        self._now = self._clock() - self._origin
        if self._steps == self.warmup_steps:  # now the device, too, has done the warm-up
            self._warm_at = self._now
        seconds = self._now - self._window_began
        window = Window(
            steps=steps,
            seconds=seconds,
            time=seconds / steps,
            data_time=self._window_data / steps,
            fps=steps * self.images_per_step / seconds,
            fps_average=self.fps_average,
            warming_up=self.warming_up,
            data_share=self._window_data / seconds,
        )
        self._window_steps, self._window_began, self._window_data = self._steps, self._now, 0.0
        return window

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for evaluation or checkpoint writing; may be nested."""
        elapsed = self._clock() - self._origin
        try:
            yield
        finally:
            self._origin = self._clock() - elapsed
