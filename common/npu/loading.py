"""How loader workers run: their number, what they read ahead, which signals they outlive."""

import os
import signal
from collections.abc import Iterator

from torch.utils.data import DataLoader

PREFETCHED_BATCHES = 4  # by each worker: a slow batch now and then does not hold up a step
MAX_WORKERS = 16  # for each rank: more do not speed up decoding, but cost memory
SECONDS_TO_OUTLIVE_SIGTERM = 60


def workers_per_rank(requested: int, ranks_on_host: int) -> int:
    """Return the number of loader processes of a rank.

    `requested` is taken as it is unless it is negative; then a rank gets its share of the cores,
    less one for the rank's main process.
    """
    if requested >= 0:
        return requested
    share = usable_cores() // ranks_on_host
    return max(0, min(MAX_WORKERS, share - 1))


def usable_cores() -> int:
    """Return the number of cores that this process may use; a container may allow fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def loader_options(workers: int, pin_memory: bool) -> dict:
    """Return the arguments of a DataLoader that concern its workers."""
    return {
        "num_workers": workers,
        "prefetch_factor": PREFETCHED_BATCHES if workers else None,
        "pin_memory": pin_memory,
        "worker_init_fn": outlive_signals,
    }


def outlive_signals(worker: int) -> None:
    """Let a worker live on after Ctrl-C or SIGTERM, so that the main process can save.

    Both signals may reach the whole process group. The main process finishes its step and writes
    a checkpoint, for which the workers must still be there; one that nobody ends after that ends
    by itself a minute later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


def end_later(number: int, frame: object) -> None:
    signal.alarm(SECONDS_TO_OUTLIVE_SIGTERM)


def repeat_first_batch(loader: DataLoader) -> Iterator:
    """Yield the first batch of a loader again and again, as often as it has batches."""
    batch = next(iter(loader))
    for _ in range(len(loader)):
        yield batch
