"""The profiler of each device, and the marks between which its time is measured."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

TRACE_FILE = "trace.json.gz"  # Chrome's format
TRACE_FOLDER = "trace"  # of torch_npu, which writes several files


class Operator(NamedTuple):
    """An operator of the profiled steps, without the operators that it calls."""

    name: str
    milliseconds: float
    calls: int


def mark_time(device: torch.device):
    """Return a mark of the moment when the device has done everything issued so far."""
    if device.type == "cpu":
        return time.perf_counter()
    event = getattr(torch, device.type).Event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(first, second) -> float:
    """Return the time between two marks that have passed."""
    if isinstance(first, float):
        return 1000 * (second - first)
    return first.elapsed_time(second)


class OperatorProfiler:
    """torch's profiler, on an NPU torch_npu's, which writes its trace in `folder`."""

    def __init__(self, device: torch.device, folder: Path):
        self.device = device
        self.folder = folder
        self._profiler = _torch_npus(folder) if device.type == "npu" else _torchs(device)

    def start(self) -> None:
        """Begin to profile."""
        self._profiler.start()

    def stop(self) -> str:
        """End, write the trace, and return a line that says where it is and what reads it."""
        self._profiler.stop()
        if self.device.type == "npu":
            return f"{self.folder / TRACE_FOLDER} (MindStudio Insight)"
        path = self.folder / TRACE_FILE
        self._profiler.export_chrome_trace(str(path))
        return f"{path} (ui.perfetto.dev, chrome://tracing)"

    def longest_operators(self, count: int) -> list[Operator]:
        """Return the operators that took most of the device's time, the longest first.

        There are none on an NPU: torch_npu only writes them, in operator_details.csv.
        """
        if self.device.type == "npu":
            return []
        return _longest(self._profiler.key_averages(), self.device, count)


def _longest(averages: Iterable, device: torch.device, count: int) -> list[Operator]:
    operators = []
    for average in averages:
        if average.is_user_annotation:  # the phases of a step
            continue
        microseconds = average.self_device_time_total
        if device.type == "cpu":
            microseconds = average.self_cpu_time_total
        operators.append(Operator(average.key, microseconds / 1000, average.count))
    operators.sort(key=lambda operator: -operator.milliseconds)
    return operators[:count]


def _torchs(device: torch.device) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def _torch_npus(folder: Path):
    import torch_npu

    activities = torch_npu.profiler.ProfilerActivity
    return torch_npu.profiler.profile(
        activities=[activities.CPU, activities.NPU],
        on_trace_ready=torch_npu.profiler.tensorboard_trace_handler(str(folder / TRACE_FOLDER)),
    )
