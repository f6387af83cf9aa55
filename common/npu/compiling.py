"""torch.compile, which `--compile` asks for: what of a run is compiled, and how long that takes."""

import time
import warnings
from collections.abc import Callable
from textwrap import shorten
from typing import TypeVar

import torch
from torch import nn

from common.errors import UserError
from common.npu.device import in_host_memory

Function = TypeVar("Function", bound=Callable)

NEEDS = {
    "cpu": "g++ and the headers of Python (on Debian and Ubuntu g++ and python3-dev)",
    "cuda": "triton, gcc and the headers of Python (on Debian and Ubuntu gcc and python3-dev)",
}
LONGEST_REASON = 200  # characters of another program's message


class Compiler:
    """Compiles what a run computes in each step, and counts the seconds that it takes.

    With `asked` false everything stays as it is. Each shape gets code of its own: with code for any
    shape, the bits of a run would depend on the shape that came first, and a resumed run would
    differ from an uninterrupted one. Raise UserError where the device has no compiler.
    """

    def __init__(self, device: torch.device, asked: bool):
        self.device = device
        self.asked = asked
        self._seconds = 0.0
        self._started_at = 0.0
        if not asked:
            return
        if device.type not in NEEDS:
            raise UserError(f"--compile: only for cuda and cpu, not for {device.type}", "omit it")
        # What these functions remember is computed within the compiled code instead.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        require_working(device)
        torch._dynamo.on_compile_start(self._start_clock)
        torch._dynamo.on_compile_end(self._stop_clock)

    @property
    def compiles_networks(self) -> bool:
        """Whether networks are compiled.

        On a CPU they are not: their time is that of the convolutions, compiled or not, and
        compiling takes minutes.
        """
        return self.asked and not in_host_memory(self.device)

    def function(self, function: Function) -> Function:
        """Return the compiled function or module; it is compiled at its first call."""
        if not self.asked:
            return function
        return torch.compile(function, dynamic=False)

    def network(self, network: nn.Module, cuda_graphs: bool = False) -> nn.Module:
        """Return the compiled network, whose weights are those of `network`.

        `cuda_graphs` replays the kernels of each shape as one graph: for networks of many small
        kernels. Its outputs and gradients live until the next step, in which they are overwritten:
        the gradients of the last step must be released before it.
        """
        if not self.compiles_networks:
            return network
        mode = "reduce-overhead" if cuda_graphs else "default"
        return torch.compile(network, dynamic=False, mode=mode)

    def take_seconds(self) -> float:
        """Return how many seconds were spent compiling since the last call."""
        seconds = self._seconds
        self._seconds = 0.0
        return seconds

    def _start_clock(self, *details: object) -> None:
        self._started_at = time.perf_counter()

    def _stop_clock(self, *details: object) -> None:
        self._seconds += time.perf_counter() - self._started_at


def require_working(device: torch.device) -> None:
    """Raise UserError unless a small function can be compiled for the device and gives its result.

    Only a trial shows that compiler, headers and libraries are there and fit each other.
    """
    numbers = torch.arange(64, dtype=torch.float32, device=device)
    try:
        compiled = torch.compile(_trial, fullgraph=True, dynamic=False)(numbers)
    except Exception as error:
        raise UserError(
            f"--compile: torch.compile does not work here ({_reason(error)})",
            f"install {NEEDS[device.type]}, or omit it",
        ) from None
    torch.testing.assert_close(compiled, _trial(numbers))


def _trial(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers * 2 + 1).sum()


def _reason(error: Exception) -> str:
    """Return the line of an error that says most: a compiler's own one, else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    for line in lines:
        if "error: " in line:
            return shorten(line, LONGEST_REASON, placeholder=" ...")
    return shorten(lines[0], LONGEST_REASON, placeholder=" ...")
