"""Timing of peers side by side: one process, taking turns, so that the machine's noise hits all.

A ratio of two peers is the median of their ratios round by round.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one peer, an entry a round."""

    cpu: np.ndarray  # of the whole process: all its threads
    wall: np.ndarray


def race(peers: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Run all peers `warmup` times unmeasured, then `rounds` times, in turn."""
    cpu, wall = ({name: [] for name in peers} for _ in range(2))
    for turn in range(warmup + rounds):
        for name, run in peers.items():
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            run()
            if turn >= warmup:
                cpu[name].append(time.process_time() - cpu_start)
                wall[name].append(time.perf_counter() - wall_start)
    return {name: Timing(np.array(cpu[name]), np.array(wall[name])) for name in peers}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """The median of the rounds' ratios."""
    return float(np.median(numerator / denominator))


def print_speeds(title: str, times: dict[str, Timing], images: int, base: str, one: str) -> None:
    """A table of peers that read so many images a round; the header calls the `base` peer `one`."""
    rows = []
    for name, timing in times.items():
        seconds = np.median(timing.cpu) / images
        speeds = (f"{1 / seconds:.0f}", f"{images / timing.cpu.min():.0f}")
        against = ratio(timing.cpu, times[base].cpu)
        rows.append((name, f"{1e3 * seconds:.2f}", *speeds, f"{against:.2f}"))
    header = ("", "CPU ms an image", "images/s a core", "in the best round", f"time, {one} = 1")
    print_table(title, header, rows)


def print_table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    """A Markdown table under a line that says where and when it was measured."""
    print(f"## {title}\n\n{_circumstances()}\n")
    for cells in (header, ("---",) * len(header), *rows):
        print("| " + " | ".join(map(str, cells)) + " |")
    print()


def _circumstances() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    parts = (
        f"{date.today()}",
        f"commit {commit or 'unknown'}",
        f"{_processor()} ({os.cpu_count()} cores)",
        f"torch {torch.__version__}",
        f"{torch.get_num_threads()} thread(s)",
        f"load average {os.getloadavg()[0]:.1f}",
    )
    return ", ".join(parts)


def _processor() -> str:
    lines = Path("/proc/cpuinfo")
    names = lines.read_text().split("\n") if lines.exists() else []
    names = [line.split(":")[1].strip() for line in names if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
