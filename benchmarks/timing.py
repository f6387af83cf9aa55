"""Timing of peers side by side: in one process, in turns, so that the machine's noise hits all.

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
    """The seconds of one peer, an entry for each round."""

    cpu: np.ndarray  # of the process: the sum over all its threads
    wall: np.ndarray


def race(peers: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Run all peers in turn: `warmup` times without measuring, then `rounds` times."""
    for _ in range(warmup):
        for run in peers.values():
            run()

    cpu_seconds = {name: [] for name in peers}
    wall_seconds = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in peers.items():
            cpu_start = time.process_time()
            wall_start = time.perf_counter()
            run()
            cpu_seconds[name].append(time.process_time() - cpu_start)
            wall_seconds[name].append(time.perf_counter() - wall_start)

    timings = {}
    for name in peers:
        timings[name] = Timing(np.array(cpu_seconds[name]), np.array(wall_seconds[name]))
    return timings


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Return the median of the rounds' ratios."""
    return float(np.median(numerator / denominator))


def print_speeds(
    title: str, times: dict[str, Timing], images: int, base: str, base_label: str
) -> None:
    """Print a table of peers that read `images` images a round, relative to the peer `base`."""
    rows = []
    for name, timing in times.items():
        seconds_per_image = np.median(timing.cpu) / images
        rows.append(
            (
                name,
                f"{1e3 * seconds_per_image:.2f}",
                f"{1 / seconds_per_image:.0f}",
                f"{images / timing.cpu.min():.0f}",
                f"{ratio(timing.cpu, times[base].cpu):.2f}",
            )
        )
    header = (
        "",
        "CPU ms an image",
        "images/s a core",
        "in the best round",
        f"time, {base_label} = 1",
    )
    print_table(title, header, rows)


def print_table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Print a Markdown table under a line that says where and when it was measured."""
    print(f"## {title}\n\n{circumstances()}\n")
    print_row(header)
    print_row(("---",) * len(header))
    for row in rows:
        print_row(row)
    print()


def print_row(cells: tuple) -> None:
    texts = [str(cell) for cell in cells]
    print(f"| {' | '.join(texts)} |")


def circumstances() -> str:
    """Return date, commit, machine and load, as far as they are known."""
    facts = (
        f"{date.today()}",
        f"commit {commit()}",
        f"{processor()} ({os.cpu_count()} cores)",
        f"torch {torch.__version__}",
        f"{torch.get_num_threads()} thread(s)",
        f"load average {os.getloadavg()[0]:.1f}",
    )
    return ", ".join(facts)


def commit() -> str:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or "unknown"


def processor() -> str:
    """Return the processor's name: from /proc on Linux, where Python does not know it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
