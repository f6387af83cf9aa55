"""`--batch_size auto`: the largest batch that trains on the device, found by trying.

On a CPU, which is seldom faster with larger batches, it is the one beyond which speed rises no
more: there a batch that may not fit is never tried, since it would not be refused but the process
killed.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from common.arithmetic import round_down
from common.errors import UserError
from common.npu import distributed, memory
from common.npu.device import in_host_memory, synchronize
from common.npu.entry import found_no_kernel, full_memory
from common.npu.loading import PREFETCHED_BATCHES
from common.npu.run import Run
from common.npu.trial_step import Snapshot, TrialStep

GIB = 2**30
NO_RATE = 0.0  # of the tries: weights stay as they are, whatever the gradients
TIMED_STEPS = 2  # of a try on an accelerator; on a CPU it is one
MOST_REFINEMENTS = 4  # tries between a batch that fits and one that does not
FINENESS = 8  # the result is right to this part of it
# For a CPU
RISE = 1.05  # a batch is faster if it has so many times the images a second
MOST_WITHOUT_RISE = 2  # doublings
LONGEST_TRY = 60.0  # seconds that it may be expected to take

LIMITED_BY_MEMORY = f"a larger one would leave less than {memory.KEPT_FREE:.0%} of the memory free"
LIMITED_BY_DATA = "the training set has no more images for a rank"
LIMITED_BY_SPEED = "larger ones are no faster on this CPU"
LIMITED_BY_TIME = f"to try a larger one on this CPU would take more than {LONGEST_TRY:.0f} s"
STOPPED = "the search was stopped by a signal"


class Try(NamedTuple):
    """A batch that was tried on all ranks."""

    size: int  # images a rank
    fits: bool
    used: int  # bytes, of the rank that has used most
    seconds: float  # a step, of the slowest rank

    @property
    def images_per_second(self) -> float:
        """The speed of a rank."""
        return self.size / self.seconds


def find_batch_size(
    run: Run,
    step: TrialStep,
    largest_sample: Callable,
    train_set: Any,
    num_images: int,
    least: int = 1,
) -> int:
    """Return the images a rank of the largest batch that trains on the devices of all ranks.

    `largest_sample` is that of a model's data. A rank gets at most its share of `num_images`, and
    `least` images at least go through the network together. A resumed run keeps its global batch.
    All ranks must call it. What the tries have changed is put back. Raise UserError where no batch
    fits.
    """
    if run.resumed is not None:
        batch_size = _batch_of_resumed(run)
    else:
        smallest = least * run.settings.accumulate
        largest = round_down(num_images // run.ranks.world_size, smallest)
        if largest == 0:
            raise UserError(
                f"--batch_size auto: {num_images} images are too few for {smallest} on each of "
                f"{run.ranks.world_size} ranks",
                "give a number",
            )
        if run.precision.apex is not None:
            raise UserError("--batch_size auto: not with --amp_backend apex", "give a number")
        batch_size = _search(run, step, largest_sample, train_set, smallest, largest)
    run.found_batch_size = batch_size
    run.flags = {**run.flags, "batch_size": batch_size}  # which run.json repeats
    return batch_size


def _batch_of_resumed(run: Run) -> int:
    global_batch = run.resumed_identity("global batch")
    batch_size, rest = divmod(global_batch, run.ranks.world_size)
    if rest:
        raise UserError(
            f"--batch_size auto: {run.ranks.world_size} ranks cannot share the resumed run's "
            f"global batch of {global_batch} images equally",
            f"start a number of ranks that divides {global_batch}",
        )
    run.log.info(f"--batch_size auto: {batch_size}, which is that of the resumed run")
    return batch_size


def _search(
    run: Run,
    step: TrialStep,
    largest_sample: Callable,
    train_set: Any,
    smallest: int,
    largest: int,
) -> int:
    snapshot = Snapshot(step.network, step.optimizer, step.precision)
    step.network.train()
    try:
        sample = largest_sample(step.recipe, train_set)
        search = BatchSearch(run, step, sample, smallest, largest)
        best, reason = search.best()
    finally:
        step.forget()
        snapshot.restore()
        memory.give_back(run.device)
    world_size = run.ranks.world_size
    before = step.recipe.base_lr(world_size, step.recipe.batch_size)
    rate = step.recipe.base_lr(world_size, best.size)
    text = f"{rate:g}, as with any batch"
    if rate != before:
        text = f"{rate:g}, in proportion; {before:g} with the recipe's {step.recipe.batch_size}"
    run.log.info(
        f"--batch_size {best.size} is taken: {reason}; the global batch is "
        f"{world_size * best.size} images, the learning rate {text}"
    )
    return best.size


class BatchSearch:
    """Tries batches of `smallest` images a rank and multiples of it, up to `largest`."""

    def __init__(self, run: Run, step: TrialStep, sample: Any, smallest: int, largest: int):
        self.run = run
        self.step = step
        self.sample = sample
        self.smallest = smallest
        self.largest = largest
        self.on_cpu = in_host_memory(run.device)
        self.fitting: list[Try] = []  # in the order of their sizes
        self.too_large = 0  # the smallest size that does not fit; 0: none is known
        self.before = self._memory()
        self._log_plan()

    def _log_plan(self) -> None:
        max_boxes = self.sample.boxes.shape[1]
        self.run.log.info(
            f"--batch_size auto: trying batches with the largest input and {max_boxes} boxes an "
            f"image; a rank may use {self.before.room / GIB:.1f} of {self.before.total / GIB:.1f} "
            "GiB"
        )

    def best(self) -> tuple[Try, str]:
        """Return the batch to take, and why it is no larger one.

        Raise UserError where the smallest does not fit.
        """
        reason = self._grow()
        if self.too_large and self._is_rising():
            self._refine()
        if not self.fitting:
            raise UserError(
                f"--batch_size auto: a batch of {self.smallest} does not fit the memory of the "
                "device",
                "take a smaller network or input, or half precision (--amp=O1)",
            )
        best = self.fitting[-1]
        if self.on_cpu:
            best = self._fastest()
            if best is not self.fitting[-1]:
                reason = LIMITED_BY_SPEED
        return best, reason

    def _grow(self) -> str:
        """Double the batch as long as that makes sense; return why it does not any more."""
        size = self.smallest
        while True:
            tried = self._try(size)
            if not tried.fits:
                return LIMITED_BY_MEMORY
            if self.run.stop.agreed(self.run.ranks):
                return STOPPED
            if size == self.largest:
                return LIMITED_BY_DATA
            size = min(2 * size, self.largest)
            if not self.on_cpu:
                continue
            doublings = len(self.fitting) - 1 - self.fitting.index(self._fastest())
            if doublings >= MOST_WITHOUT_RISE:
                return LIMITED_BY_SPEED
            if not self._may_be_tried(size):
                return LIMITED_BY_MEMORY
            if 2 * size / tried.images_per_second > LONGEST_TRY:
                return LIMITED_BY_TIME

    def _fastest(self) -> Try:
        """Return the last batch that was faster than all smaller ones."""
        fastest = self.fitting[0]
        for tried in self.fitting:
            if tried.images_per_second > RISE * fastest.images_per_second:
                fastest = tried
        return fastest

    def _is_rising(self) -> bool:
        """Whether a larger batch than the largest that fits is worth a try."""
        if not self.fitting:
            return False
        return not self.on_cpu or self._fastest() is self.fitting[-1]

    def _may_be_tried(self, size: int) -> bool:
        """Return whether a batch will fit, by the memory of the largest one that was tried."""
        expected = self._expected(size)
        if not self.run.ranks.any(expected > self.before.room):
            return True
        self.too_large = size
        self.run.log.info(
            f"  batch {size}: not tried, it would take about {expected / GIB:.2f} GiB"
        )
        return False

    def _expected(self, size: int) -> float:
        """Return the bytes that a batch will use at most: what does not grow is taken to grow."""
        tried = self.fitting[-1]
        return self.before.used + (tried.used - self.before.used) * size / tried.size

    def _refine(self) -> None:
        """Try batches between the largest that fits and the smallest that does not."""
        doubled = self.fitting[-1].size
        grain = self.smallest * max(1, doubled // FINENESS // self.smallest)
        most = 1 if self.on_cpu else MOST_REFINEMENTS
        for _ in range(most):
            if self.too_large - self.fitting[-1].size <= grain:
                return
            size = self._between(grain)
            if self.on_cpu and not self._may_be_tried(size):
                return
            self._try(size)
            if self.run.stop.agreed(self.run.ranks):
                return

    def _between(self, grain: int) -> int:
        """Return the size at which memory is expected to be full, else the middle."""
        before, last = self.fitting[-2:]  # next to a single one nothing is left to try
        bytes_per_image = (last.used - before.used) / (last.size - before.size)
        if bytes_per_image > 0:
            room = min(self.run.ranks.all_gather_objects(self.before.room))
            size = last.size + int((room - last.used) / bytes_per_image)
            size = round_down(size, grain)
            if last.size < size < self.too_large:
                return size
        return max(last.size + self.smallest, round_down((last.size + self.too_large) // 2, grain))

    def _try(self, size: int) -> Try:
        """Train a few steps with a batch on every rank, log that, and return the result."""
        run = self.run
        is_full = False
        seconds = 0.0
        try:
            seconds = self._time_step(size)
        except Exception as error:
            lacks_workspace = len(self.fitting) > 0 and found_no_kernel(error)
            if full_memory(error) is None and not lacks_workspace:
                raise
            is_full = True
        # The error is gone, and with it what its traceback held.
        used = memory.peak(run.device) + self._bytes_of_loader(size)
        self.step.forget()
        memory.give_back(run.device)
        fits = not is_full and used <= self._memory().room
        of_ranks = run.ranks.all_gather_objects((fits, used, seconds))
        tried = Try(
            size=size,
            fits=all(fits for fits, _, _ in of_ranks),
            used=max(used for _, used, _ in of_ranks),
            seconds=max(seconds for _, _, seconds in of_ranks),
        )
        if run.ranks.any(is_full):
            run.log.info(f"  batch {size}: the memory is full")
        else:
            text = (
                f"  batch {size}: {tried.used / GIB:.2f} GiB, {1000 * tried.seconds:.0f} ms a "
                f"step, {tried.images_per_second:.1f} images/s of a rank"
            )
            run.log.info(text if tried.fits else f"{text}: too much")
        if tried.fits:
            self.fitting.append(tried)
        else:
            self.too_large = size
        return tried

    def _time_step(self, size: int) -> float:
        """Return the seconds of a step; no rank waits for another in it.

        The peak of memory is that of these steps. On an accelerator one comes before: in it kernels
        are chosen, which takes memory only where there is some.
        """
        device = self.run.device
        batch = type(self.sample)(*[torch.cat([field] * size) for field in self.sample])
        with distributed.alone():
            batch = batch.to(device)
            if not self.on_cpu:
                self.step.do(batch, NO_RATE)
                memory.give_back(device)
            memory.reset_peak(device)
            self.step.do(batch, NO_RATE)
            synchronize(device)
            timed_steps = 1 if self.on_cpu else TIMED_STEPS
            began = time.perf_counter()
            for _ in range(timed_steps):
                self.step.do(batch, NO_RATE)
            synchronize(device)
        return (time.perf_counter() - began) / timed_steps

    def _bytes_of_loader(self, size: int) -> int:
        """Return the host's memory of the batches that a rank's loader has ready, for a CPU."""
        if not self.on_cpu:
            return 0
        bytes_of_image = sum(field.nbytes for field in self.sample)
        return self.run.workers * PREFETCHED_BATCHES * size * bytes_of_image

    def _memory(self) -> memory.Memory:
        found = memory.memory_of(self.run.device, self.run.ranks.local_world_size)
        if found is None:
            raise UserError(
                "--batch_size auto: the memory of this host is not known", "give a number"
            )
        return found
