"""How loader workers run: their number, what they read ahead, which signals they outlive.

And whether what they load fits the host's memory.
"""

import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from common.npu.device import in_host_memory
from common.npu.distributed import Ranks

PREFETCHED_BATCHES = 4  # by each worker: a slow batch now and then does not hold up a step
MAX_WORKERS = 16  # for each rank: more do not speed up decoding, but cost memory
SECONDS_TO_OUTLIVE_SIGTERM = 60
CHANNELS = 3  # of an image
FLOAT_BYTES = 4
MEMORY_INFO = Path("/proc/meminfo")


class ControlGroup(NamedTuple):
    """Where a container's memory is found: its limit, what is taken of it, and of what."""

    limit: Path
    usage: Path
    statistics: Path


# In the two versions of Linux's control groups.
CONTROL_GROUPS = (
    ControlGroup(
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory.current"),
        Path("/sys/fs/cgroup/memory.stat"),
    ),
    ControlGroup(
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.stat"),
    ),
)
OF_FILES = ("active_file", "inactive_file")  # in the statistics: what the system holds of files


def usable_cores() -> frozenset[int]:
    """Return the cores that this process may use; a container or a binding may allow fewer."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count()))


# Read before a device is used: torch_npu may bind the main thread to one (CPU_AFFINITY_CONF=2).
CORES_AT_START = usable_cores()


def workers_per_rank(requested: int, ranks: Ranks) -> int:
    """Return the number of loader processes of a rank; all ranks must call this.

    `requested` is taken as it is unless it is negative. Then the ranks of a host that may run on
    the same cores share them equally, less one for each rank's main process; a rank that was bound
    to cores of its own has them all.
    """
    own = (platform.node(), CORES_AT_START)
    num_sharing = 0
    for host, cores in ranks.all_gather_objects(own):
        if host == own[0] and not cores.isdisjoint(own[1]):
            num_sharing += 1
    if requested >= 0:
        return requested
    share = len(own[1]) // num_sharing
    return max(0, min(MAX_WORKERS, share - 1))


def require_memory_for_batch(
    batch_size: int, canvas: tuple[int, int], ranks: Ranks, device: torch.device
) -> None:
    """Raise UserError where the images of one batch a rank do not fit the memory of this host.

    `canvas` is the smallest (height, width) in pixels that an image has in a batch. Counted are the
    loader's bytes and, on a CPU, the network's input. A run takes much more than that, so a batch
    that is not refused may still be too large.
    """
    total = host_memory()
    if total is None:
        return
    height, width = canvas
    value_bytes = 1 + FLOAT_BYTES if in_host_memory(device) else 1
    needed = ranks.local_world_size * batch_size * CHANNELS * height * width * value_bytes
    if needed > total:
        raise UserError(
            f"--batch_size {batch_size}: the images of one batch take {needed / 2**30:.1f} GiB for "
            f"the ranks of this host, which has {total / 2**30:.1f} GiB of memory",
            "give a smaller one",
        )


def host_memory() -> int | None:
    """Return the bytes of memory and swap that processes may use, None where that is not known."""
    memory = total_memory()
    if memory is None:
        return None
    return memory + _memory_sizes().get("SwapTotal", 0)


def total_memory() -> int | None:
    """Return the bytes of memory of this host or container, None where that is not known."""
    if not MEMORY_INFO.exists():
        return None
    memory = _memory_sizes()["MemTotal"]
    for group in CONTROL_GROUPS:
        memory = min(memory, _number_in(group.limit) or memory)
    return memory


def free_memory() -> int | None:
    """Return the bytes of memory that processes may still take, None where that is not known.

    What the system holds of files counts as free: it gives that up for processes. Swap does not
    count.
    """
    if not MEMORY_INFO.exists():
        return None
    free = _memory_sizes()["MemAvailable"]
    for group in CONTROL_GROUPS:
        limit = _number_in(group.limit)
        usage = _number_in(group.usage)
        if limit is None or usage is None:
            continue
        of_files = 0
        for line in group.statistics.read_text().splitlines():
            name, _, size = line.partition(" ")
            if name in OF_FILES:
                of_files += int(size)
        free = min(free, limit - usage + of_files)
    return max(0, free)


def _memory_sizes() -> dict[str, int]:
    """Return what the system says of its memory, in bytes."""
    sizes = {}
    for line in MEMORY_INFO.read_text().splitlines():
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) * 1024
    return sizes


def _number_in(path: Path) -> int | None:
    """Return the number in a file, None where there is no file or no number in it."""
    if not path.exists():
        return None
    text = path.read_text().strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit


def loader_options(workers: int, pin_memory: bool) -> dict:
    """Return the arguments of a DataLoader that concern its workers."""
    return {
        "num_workers": workers,
        "prefetch_factor": PREFETCHED_BATCHES if workers else None,
        "pin_memory": pin_memory,
        "worker_init_fn": outlive_signals,
    }


def outlive_signals(worker: int) -> None:
    """Let a worker live on after Ctrl-C, SIGHUP or SIGTERM, so that the main process can save.

    These signals may reach the whole process group. The main process finishes its step and writes
    a checkpoint, for which the workers must still be there; one that nobody ends after that ends
    by itself a minute later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


def end_later(number: int, frame: object) -> None:
    signal.alarm(SECONDS_TO_OUTLIVE_SIGTERM)


def repeat_first_batch(loader: DataLoader) -> Iterator:
    """Yield the first batch of a loader again and again, as often as it has batches."""
    batch = next(iter(loader))
    for _ in range(len(loader)):
        yield batch
