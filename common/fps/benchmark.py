"""The speed of a trained detector: how long an image takes, phase by phase."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.coco.metrics import BENCHMARK, add_to_metrics
from common.fps.network_size import count_flops, num_parameters
from common.npu.device import memory_mib, synchronize

DEFAULT_BATCH_SIZES = (1, 8, 32)
WARM_UP_ROUNDS = 3
MOST_ROUNDS = 100
FEWEST_ROUNDS = 5
SECONDS = 20.0  # for a batch size, unless the fewest rounds take longer
PERCENTILES = (50, 90, 99)
PHASES = ("prepare", "network", "detect")


class Speed(NamedTuple):
    """What was measured at one batch size, in milliseconds a batch."""

    batch_size: int
    rounds: int
    images_per_second: float
    memory_mib: int  # the largest so far: of tensors on the device, of the process on a CPU
    percentiles: dict[str, list[float]]  # of PHASES, those of PERCENTILES


def measure_speed(
    detector, images: Sequence[np.ndarray], batch_size: int, seconds: float = SECONDS
) -> Speed:
    """Measure a detector's phases: `prepare`, `run_network` and `finish`.

    Each round takes the next of `images`, (H, W, 3) uint8 RGB, and puts it `batch_size` times into
    the batch, because FCOS wants images of one size. The host waits for the device after each
    phase, so no phase hides another one.
    """
    for i in range(WARM_UP_ROUNDS):
        time_phases(detector, [images[i % len(images)]] * batch_size)
    rounds = []  # the milliseconds of each phase
    end = time.perf_counter() + seconds
    while len(rounds) < MOST_ROUNDS:
        if len(rounds) >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        rounds.append(time_phases(detector, [images[len(rounds) % len(images)]] * batch_size))
    milliseconds = np.array(rounds)  # (rounds, phases)
    percentiles = np.percentile(milliseconds, PERCENTILES, axis=0)  # (percentiles, phases)
    return Speed(
        batch_size=batch_size,
        rounds=len(rounds),
        images_per_second=1000 * len(rounds) * batch_size / milliseconds.sum(),
        memory_mib=memory_mib(detector.device),
        percentiles=dict(zip(PHASES, percentiles.T.tolist(), strict=True)),
    )


def time_phases(detector, batch: list[np.ndarray]) -> np.ndarray:
    """Return the milliseconds of each of PHASES for a batch of images."""
    started = time.perf_counter()
    inputs = detector.prepare(batch)
    synchronize(detector.device)
    prepared = time.perf_counter()
    outputs = detector.run_network(inputs)
    synchronize(detector.device)
    computed = time.perf_counter()
    detector.finish(outputs, batch)
    finished = time.perf_counter()
    return 1000 * np.diff([started, prepared, computed, finished])


def report_speed(
    detector,
    images: Sequence[np.ndarray],
    batch_sizes: Sequence[int],
    metrics_file: Path,
    log: Callable[[str], None],
    seconds: float = SECONDS,
) -> None:
    """Log a table of a detector's speed and add it to the file of metrics, as "benchmark".

    Where a batch does not fit the device's memory, its line says so and larger ones are left out.
    """
    height, width = detector.prepare([images[0]]).shape[2:]
    parameters = num_parameters(detector.model)
    flops = count_flops(detector.model, height, width)
    log(
        f"benchmark on {detector.device}, network {detector.precision}: {parameters / 1e6:.1f} M "
        f"parameters, {flops / 1e9:.1f} GFLOPs an image of {width} x {height} pixels\n"
        "prepare: resize, copy, normalise; detect: decode, NMS; milliseconds a batch, "
        "p50 / p90 / p99"
    )
    columns = [f"{phase:^24}" for phase in PHASES]
    log(f"{'batch':>5}  {'images/s':>8}  {'  '.join(columns)}  {'MiB':>6}")
    measured = []
    for batch_size in sorted(batch_sizes):
        try:
            speed = measure_speed(detector, images, batch_size, seconds)
        except torch.OutOfMemoryError:
            log(f"{batch_size:>5}  does not fit the device's memory")
            break
        log(speed_line(speed))
        measured.append(speed._asdict())
    benchmark = {
        "device": str(detector.device),
        "precision": str(detector.precision),
        "parameters": parameters,
        "flops": flops,
        "input": [height, width],
        "percentiles": PERCENTILES,
        "batches": measured,
    }
    add_to_metrics(metrics_file, BENCHMARK, benchmark)


def speed_line(speed: Speed) -> str:
    """Return a line of the table."""
    columns = []
    for phase in PHASES:
        times = " / ".join(f"{value:.1f}" for value in speed.percentiles[phase])
        columns.append(f"{times:^24}")
    return (
        f"{speed.batch_size:>5}  {speed.images_per_second:>8.1f}  {'  '.join(columns)}  "
        f"{speed.memory_mib:>6}"
    )
