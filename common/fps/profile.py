"""`--profile N`: what a training step takes, phase by phase and operator by operator.

After some steps of warm-up N steps are timed by phase, and N more are run under the profiler, which
slows them down. Then the loader is timed alone.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from common.npu.device import memory_mib, synchronize
from common.npu.profiling import OperatorProfiler, mark_time, milliseconds_between

WARM_UP_STEPS = 10
PHASES = ("augment", "forward", "loss", "backward", "optimizer")
OPERATORS = 10  # in the list
LONGEST_NAME = 60  # characters of an operator's name


class Profile:
    """Measures steps of a run: `steps` of them by phase, and as many under the profiler.

    The phases are the calls of what `measured` returns, by the device's own clock; the network is
    `measure_network`'s.
    """

    def __init__(self, steps: int, device: torch.device):
        self.steps = steps
        self.device = device
        self.milliseconds = dict.fromkeys(("data", *PHASES), 0.0)  # of all timed steps
        self.milliseconds_per_step = 0.0
        self._done = 0
        self._began_at = 0.0
        self._marks: list[tuple[str, object, object]] = []
        self._profiler: OperatorProfiler | None = None

    @property
    def num_steps(self) -> int:
        """The steps of the run."""
        return WARM_UP_STEPS + 2 * self.steps

    @property
    def is_timing(self) -> bool:
        """Whether the phases of this step count."""
        return WARM_UP_STEPS <= self._done < WARM_UP_STEPS + self.steps

    def measured(self, phase: str, function: Callable) -> Callable:
        """Return a function whose calls are a phase."""

        @functools.wraps(function)
        def measured_function(*arguments, **named):
            with self._phase(phase):
                return function(*arguments, **named)

        return measured_function

    def measure_network(self, network: nn.Module) -> None:
        """Let the calls of a network be the phase "forward"."""
        network.forward = self.measured("forward", network.forward)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = mark_time(self.device)
        with torch.profiler.record_function(name):
            yield
        if self.is_timing:
            self._marks.append((name, began, mark_time(self.device)))

    def step_done(self, waited: float, folder: Path | None) -> None:
        """Count a step, for whose batch it `waited` seconds.

        The profiler runs where there is a `folder` for its trace: on the main rank.
        """
        if self.is_timing:
            self.milliseconds["data"] += 1000 * waited
        self._done += 1
        if self._done == WARM_UP_STEPS:
            synchronize(self.device)
            self._began_at = time.perf_counter()
        elif self._done == WARM_UP_STEPS + self.steps:
            self._add_marks()
            if folder is not None:
                self._profiler = OperatorProfiler(self.device, folder)
                self._profiler.start()

    def _add_marks(self) -> None:
        synchronize(self.device)
        seconds = time.perf_counter() - self._began_at
        self.milliseconds_per_step = 1000 * seconds / self.steps
        for name, began, ended in self._marks:
            self.milliseconds[name] += milliseconds_between(began, ended)
        self._marks.clear()

    def images_per_second(self, images_per_step: int) -> float:
        """Return the speed of the timed steps, without those under the profiler."""
        return 1000 * images_per_step / self.milliseconds_per_step

    def report(self, images_per_step: int) -> str:
        """End the profiler; return, on several lines, what was measured."""
        synchronize(self.device)
        trace = self._profiler.stop()
        per_step = self.milliseconds_per_step
        rate = self.images_per_second(images_per_step)
        lines = [
            f"profile of {self.steps} steps after {WARM_UP_STEPS} of warm-up: {per_step:.1f} ms a "
            f"step, {rate:.1f} images/s"
        ]
        rest = per_step
        for name, milliseconds in self.milliseconds.items():
            lines.append(_row(name, milliseconds / self.steps, per_step))
            rest -= milliseconds / self.steps
        # Below 0 where the host waited for data while the device was still busy.
        lines.append(_row("other", max(0.0, rest), per_step))
        operators = self._profiler.longest_operators(OPERATORS)
        if operators:
            lines.append(f"the {len(operators)} longest operators, ms a step under the profiler")
        for operator in operators:
            milliseconds = operator.milliseconds / self.steps
            calls = operator.calls / self.steps
            lines.append(f"  {milliseconds:10.2f}  {calls:7.0f} x {operator.name[:LONGEST_NAME]}")
        lines.append(f"memory: {memory_mib(self.device)} MiB at most")
        lines.append(f"trace: {trace}")
        return "\n".join(lines)


def time_loader(loader: DataLoader, batch_size: int) -> str:
    """Return a line that says how fast a loader is when nothing else is done.

    The time is that between the first batch and the last one.
    """
    first = 0.0
    last = 0.0
    count = 0
    for _ in loader:
        last = time.perf_counter()
        count += 1
        if count == 1:
            first = last
    seconds = (last - first) / (count - 1)
    return (
        f"the loader alone: {1000 * seconds:.1f} ms a batch, {batch_size / seconds:.1f} images/s "
        f"of each rank (batches: {count}, workers: {loader.num_workers})"
    )


def _row(name: str, milliseconds: float, per_step: float) -> str:
    return f"  {name:10} {milliseconds:9.2f} ms  {milliseconds / per_step:6.1%}"
