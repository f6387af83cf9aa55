"""What the host does while the device goes on: it receives copies and works in a thread."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from common.npu.device import in_host_memory, record_event, use_in_this_thread
from common.npu.loading import CORES_AT_START

# Calls that may wait or run. With two, the device has a batch to compute while the host works on
# the one before; each more would keep the memory of another batch.
MOST_UNFINISHED = 2


class HostCopy:
    """A tensor on its way from the device to the host.

    The copy is issued at once, into pinned memory, and nothing waits for it but `wait`.
    """

    def __init__(self, tensor: Tensor):
        self._copy = tensor.to("cpu", non_blocking=True)
        self._copied = record_event(tensor.device)

    def wait(self) -> Tensor:
        """Return the tensor on the host, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy


class HostWork:
    """Calls that are done on the host, one after the other, beside the work of an accelerator.

    A thread does them while the caller issues more for the device. On a CPU the network has all
    cores already: there each call is done at once. To be used in a `with`, at whose end no call is
    running.
    """

    def __init__(self, device: torch.device):
        self._thread: ThreadPoolExecutor | None = None
        if not in_host_memory(device):
            self._thread = ThreadPoolExecutor(
                max_workers=1,
                thread_name_prefix="host-work",
                initializer=_begin_thread,
                initargs=(device,),
            )
        self._unfinished: deque[Future] = deque()
        self._results: list = []

    def __enter__(self) -> "HostWork":
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def add(self, function: Callable, *arguments: object) -> None:
        """Have a call done after those before it.

        Wait where too many are unfinished, and raise what one of them has raised.
        """
        if self._thread is None:
            self._results.append(function(*arguments))
            return
        self._unfinished.append(self._thread.submit(function, *arguments))
        if len(self._unfinished) > MOST_UNFINISHED:
            self._take_oldest()

    def results(self) -> list:
        """Return what the calls have returned, in their order; wait for them and raise as `add`."""
        while self._unfinished:
            self._take_oldest()
        return self._results

    def _take_oldest(self) -> None:
        self._results.append(self._unfinished.popleft().result())


def _begin_thread(device: torch.device) -> None:
    use_in_this_thread(device)
    # A thread has the cores of the one that starts it, and torch_npu may have bound that to one
    # (CPU_AFFINITY_CONF=2), on which it launches kernels.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES_AT_START)
