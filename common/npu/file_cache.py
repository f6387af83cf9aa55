"""`--cache ram`: what a loader reads of files, in memory that all processes of a host share.

The memory is a file without a name (memfd): /dev/shm and its size do not matter, and the system
frees it when the last process that has it open ends, however it ends. The ranks of a host and
their loader workers, forked or not, open it through /proc. Linux only.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import WHOLE_FILE, Extent
from common.npu.distributed import Ranks
from common.npu.loading import free_memory

THREADS = 8  # that read at the same time: a network drive answers each of them late
SHARE_OF_FREE_MEMORY = 0.9  # the rest is for the workers' batches
SAMPLE = 64  # reads that are timed one by one, from files and from memory
# A worker takes some 5 to 20 ms for a sample; reads shorter than this gain little.
PAYS_FROM_SECONDS = 1e-3
GIB = 2**30
OMIT = "omit --cache"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")


class FileCache:
    """The bytes of extents in memory, read by their number.

    A pickled one, as a loader worker that is not forked gets it, has a path to the same memory.
    """

    def __init__(self, path: str, offsets: np.ndarray):
        self.offsets = offsets  # (E + 1,) int64: extent i is from offsets[i] to offsets[i + 1]
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 open as long as the cache is
        # An empty file cannot be mapped.
        self._memory = mmap.mmap(self._file.fileno(), max(1, int(offsets[-1])))

    @property
    def path(self) -> str:
        """The path by which other processes of the host open the memory while this one runs."""
        return _path_of(self._file.fileno())

    def read(self, i: int) -> bytes:
        """Return the bytes of an extent: a copy, as reading a file gives one too."""
        return self._memory[self.offsets[i] : self.offsets[i + 1]]

    def fill(self, i: int, extent: Extent) -> None:
        """Read an extent from its file; raise UserError where it cannot be read."""
        start, end = self.offsets[i : i + 2].tolist()
        with memoryview(self._memory) as memory, memory[start:end] as target:
            _read_into(target, extent)

    def __reduce__(self):
        return FileCache, (self.path, self.offsets)


class Filling(NamedTuple):
    """How a rank has filled its share."""

    obstacle: str | None  # a message
    stopped: bool  # by a signal


class Sample(NamedTuple):
    """The mean seconds of a read."""

    from_files: float
    from_memory: float


def filled_cache(
    extents: Sequence[Extent],
    ranks: Ranks,
    is_stopped: Callable[[], bool],
    log: Callable[[str], None],
) -> FileCache | None:
    """Return the cache of a host's extents, which its ranks have filled together.

    Its first rank makes it. All ranks must call this. `is_stopped` says whether a signal asks the
    run to stop: then there is no cache, and the files are read in its place. Raise UserError, on
    all ranks, where the memory is too small or a file cannot be read.
    """
    began_at = time.perf_counter()
    hosts = ranks.all_gather_objects(_host())
    ranks_of_host = [rank for rank, host in enumerate(hosts) if host == _host()]
    made = None
    obstacle = None
    from_files = 0.0
    if ranks.rank == ranks_of_host[0]:
        try:
            from_files = _seconds_a_read(extents)
            made = _make(extents)
        except UserError as error:
            obstacle = str(error)
    offers = ranks.all_gather_objects((obstacle, made and (made.path, made.offsets)))
    _raise_first(obstacle for obstacle, _ in offers)
    _, (path, offsets) = offers[ranks_of_host[0]]

    cache = made
    filling = Filling(None, stopped=False)
    try:
        cache = cache or _open(path, offsets)
        filling = _fill_share(cache, extents, ranks_of_host, ranks, is_stopped)
    except UserError as error:
        filling = Filling(str(error), stopped=False)
    fillings = ranks.all_gather_objects(filling)
    _raise_first(filling.obstacle for filling in fillings)
    if any(filling.stopped for filling in fillings):
        return None
    seconds = time.perf_counter() - began_at
    sample = Sample(from_files, _seconds_a_read_of_cache(cache))
    log(report(len(extents), int(offsets[-1]), seconds, sample))
    return cache


def report(num_extents: int, size: int, seconds: float, sample: Sample) -> str:
    """Return the line on a cache: what it took, and what it gains."""
    line = (
        f"--cache ram: {num_extents} images, {size / GIB:.2f} GiB of their files in memory after "
        f"{seconds:.1f} s ({num_extents / seconds:.0f} images/s); a read takes "
        f"{sample.from_memory * 1000:.3f} ms, from the files it took "
        f"{sample.from_files * 1000:.3f} ms"
    )
    if sample.from_files < PAYS_FROM_SECONDS:
        line += ": the disk is fast or the system had the files in memory already, little is gained"
    return line


def _host() -> tuple[str, str]:
    """Return what processes have in common that can open each other's files through /proc."""
    if not hasattr(os, "memfd_create"):
        return "", ""
    return BOOT_ID.read_text(), os.readlink(PID_NAMESPACE)


def _path_of(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _make(extents: Sequence[Extent]) -> FileCache:
    """Return an empty cache; raise UserError where it would not fit the memory that is free."""
    if not hasattr(os, "memfd_create"):
        raise UserError("--cache ram: needs Linux", OMIT)
    with ThreadPoolExecutor(THREADS) as threads:
        lengths = np.fromiter(threads.map(_length, extents), np.int64, len(extents))
    size = int(lengths.sum())
    free = free_memory()
    if free is not None and size > SHARE_OF_FREE_MEMORY * free:
        raise UserError(
            f"--cache ram: {len(extents)} images take {size / GIB:.2f} GiB, more than "
            f"{SHARE_OF_FREE_MEMORY:.0%} of the {free / GIB:.2f} GiB of memory that are free",
            f"{OMIT}, or train on a part with --subset",
        )
    descriptor = os.memfd_create("onestage --cache ram")
    try:
        os.ftruncate(descriptor, max(1, size))
        return FileCache(_path_of(descriptor), np.append(0, np.cumsum(lengths)))
    finally:
        os.close(descriptor)


def _open(path: str, offsets: np.ndarray) -> FileCache:
    try:
        return FileCache(path, offsets)
    except OSError as error:
        raise UserError(
            f"--cache ram: the memory of this host's first rank cannot be opened ({error})", OMIT
        ) from None


def _length(extent: Extent) -> int:
    if extent.length != WHOLE_FILE:
        return extent.length
    try:
        return os.stat(extent.path).st_size
    except OSError as error:
        raise _unreadable(extent, error.strerror) from None


def _fill_share(
    cache: FileCache,
    extents: Sequence[Extent],
    ranks_of_host: list[int],
    ranks: Ranks,
    is_stopped: Callable[[], bool],
) -> Filling:
    """Fill this rank's share of a host's cache, every n-th extent; the main rank shows a bar."""
    first = ranks_of_host.index(ranks.rank)
    share = range(first, len(extents), len(ranks_of_host))

    def fill(i: int) -> None:
        if not is_stopped():
            cache.fill(i, extents[i])

    bar = tqdm(
        total=len(share),
        desc="--cache ram",
        unit="image",
        leave=False,
        disable=None if ranks.main else True,
    )
    with bar, ThreadPoolExecutor(THREADS) as threads:
        try:
            for _ in threads.map(fill, share):
                bar.update()
        except UserError:
            threads.shutdown(cancel_futures=True)
            raise
    return Filling(None, is_stopped())


def _read_into(target: memoryview, extent: Extent) -> None:
    """Fill `target` with the bytes of an extent; raise UserError where there are fewer or more."""
    done = 0
    try:
        with open(extent.path, "rb", buffering=0) as file:
            file.seek(extent.offset)
            while done < len(target):
                count = file.readinto(target[done:])
                if count == 0:
                    break
                done += count
            is_longer = extent.length == WHOLE_FILE and len(file.read(1)) > 0
    except OSError as error:
        raise _unreadable(extent, error.strerror) from None
    if done < len(target) or is_longer:
        raise _unreadable(extent, "its size changes")


def _unreadable(extent: Extent, reason: str | None) -> UserError:
    return UserError(f"--cache ram: {extent.path} cannot be read ({reason})", "check the file")


def _seconds_a_read(extents: Sequence[Extent]) -> float:
    """Return the mean seconds of reading a few extents, spread over all, one after another."""
    chosen = [extents[i] for i in _spread(len(extents))]
    began_at = time.perf_counter()
    for extent in chosen:
        _read_into(memoryview(bytearray(_length(extent))), extent)
    return (time.perf_counter() - began_at) / len(chosen)


def _seconds_a_read_of_cache(cache: FileCache) -> float:
    chosen = _spread(len(cache.offsets) - 1)
    began_at = time.perf_counter()
    for i in chosen:
        cache.read(i)
    return (time.perf_counter() - began_at) / len(chosen)


def _spread(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, SAMPLE, dtype=int)).tolist()


def _raise_first(obstacles: Iterable[str | None]) -> None:
    for obstacle in obstacles:
        if obstacle is not None:
            raise UserError(obstacle)
