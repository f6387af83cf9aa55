"""Memory: how much of a device this process may use, and how much it has used.

On a CPU that is the memory of the host without swap, which its processes share.
"""

import gc
from pathlib import Path
from typing import NamedTuple

import torch

from common.npu.device import in_host_memory
from common.npu.loading import free_memory, total_memory

KEPT_FREE = 0.1  # of the memory of a device
STATUS = Path("/proc/self/status")
CLEAR_REFERENCES = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written there; see proc(5)


class Memory(NamedTuple):
    """Bytes of the memory of a device."""

    total: int
    used: int  # by this process, now
    room: int  # this process may use so many in all, so that KEPT_FREE of the total stays free


def memory_of(device: torch.device, num_sharing: int) -> Memory | None:
    """Return the memory of a device; of a CPU that of the host, None where it is not known.

    `num_sharing` processes of this host share what is free of the host's.
    """
    if in_host_memory(device):
        return _memory_of_host(num_sharing)
    module = getattr(torch, device.type)
    free, total = module.mem_get_info(device)
    used = module.memory_reserved(device)
    used_by_others = total - free - used  # what the driver takes for this process among it
    return Memory(total, used, int((1 - KEPT_FREE) * total) - used_by_others)


def reset_peak(device: torch.device) -> None:
    """Begin to measure anew."""
    if not in_host_memory(device):
        getattr(torch, device.type).reset_peak_memory_stats(device)
        return
    try:
        CLEAR_REFERENCES.write_text(RESET_PEAK)
    except OSError:
        return  # the peak is that of the process then: later ones are still right if higher


def peak(device: torch.device) -> int:
    """Return the most bytes that this process has used since `reset_peak`.

    That is what its allocator has taken from an accelerator, tensors or not.
    """
    if in_host_memory(device):
        return _status("VmHWM")
    return getattr(torch, device.type).max_memory_reserved(device)


def give_back(device: torch.device) -> None:
    """Give memory that no tensor needs any more back to the device."""
    gc.collect()
    if not in_host_memory(device):
        getattr(torch, device.type).empty_cache()


def _memory_of_host(num_sharing: int) -> Memory | None:
    total = total_memory()
    free = free_memory()
    if total is None or free is None or not STATUS.exists():
        return None
    used = _status("VmRSS")
    room = used + (free - int(KEPT_FREE * total)) // num_sharing
    return Memory(total, used, room)


def _status(name: str) -> int:
    """Return bytes of an entry of this process's status, which has lines of `name: number kB`."""
    for line in STATUS.read_text().splitlines():
        words = line.split()
        if words[0] == f"{name}:":
            return int(words[1]) * 1024
    raise KeyError(name)
