#!/usr/bin/env python3
"""Measure all models on one GPU in at most 520 seconds, and write the tables for RESULTS.md.

    bash benchmarks/gpu.sh                                    gpu.md, on the first CUDA device
    python3 benchmarks/gpu.py --device cpu --tiny             the same course at sizes of a test

Every part is a process of its own with a limit of time, so that one that fails or hangs takes
nothing from the others: its share of what is left, by weight. The tables say which parts failed
(the exit status is 1 then) and which were left out for lack of time.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.gpu_parts import PEERS, PROGRAMS, Settings, measure
from benchmarks.timing import circumstances
from common.files import encoded, write_atomically
from common.npu import entry
from common.npu.device import device_versions, setup_device

BUDGET = 520.0  # seconds for all parts
# Shares of time: what is compiled takes longest, and comes last.
WEIGHTS = {"matrix": 1.0, "step": 3.0, "peer": 2.0, "selfcheck": 6.0, "compiled": 4.0}
LAST_LINES = 3  # of a part that failed
NEVER_MEASURED = "-"


class Result(NamedTuple):
    """What a part has brought."""

    part: str
    figures: list[dict]
    failure: str  # empty for none
    seconds: float


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.measure:
        device, _ = setup_device(args.device)
        ends_at = time.monotonic() + args.seconds
        measure(args.measure, Settings(device, args.tiny, ends_at))
        return 0
    device, reason = setup_device(args.device)
    print(reason, flush=True)
    results = []
    ends_at = time.monotonic() + args.seconds
    parts = args.parts or all_parts(args)
    for position, part in enumerate(parts):
        limit = share_of_time(parts[position:], ends_at - time.monotonic())
        print(f"{part} (at most {limit:.0f} s) ...", flush=True)
        result = run_part(part, args, limit)
        results.append(result)
        print(f"    {result.failure or f'{result.seconds:.0f} s'}", flush=True)
    where = [reason, *device_versions(device)]
    write_atomically(args.output, encoded(report(results, where, args.tiny)))
    print(f"tables: {args.output}")
    return int(len(failures(results)) > 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", nargs="?", type=Path, default=Path("gpu.md"), help="the tables")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all parts together")
    parser.add_argument("--parts", nargs="*", help='such as "step fcos"; default: all')
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the part that this process is for
    return parser.parse_args(argv)


def all_parts(args: argparse.Namespace) -> list[str]:
    """Return the parts in their order: what everything else refers to first, the longest last."""
    parts = ["matrix"]
    parts += [f"step {name}" for name in PROGRAMS]
    parts += [f"peer {name}" for name in PEERS]
    parts.append("selfcheck")
    parts += [f"compiled {name}" for name in PROGRAMS]
    return parts


def share_of_time(parts_left: list[str], seconds_left: float) -> float:
    """Return how many seconds the first of the parts may take."""
    weights = [WEIGHTS[part.partition(" ")[0]] for part in parts_left]
    return max(0.0, seconds_left * weights[0] / sum(weights))


def run_part(part: str, args: argparse.Namespace, limit: float) -> Result:
    """Run a part in a process of its own, and kill it with all that it started at its limit."""
    if part == "selfcheck":
        words = ["selfcheck.py", f"--device={args.device}"]
    else:
        words = ["benchmarks/gpu.py", f"--device={args.device}", f"--measure={part}"]
        words.append(f"--seconds={limit}")
        if args.tiny:
            words.append("--tiny")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if part == "selfcheck":
            words.append(f"--report={folder}/selfcheck.txt")
        output = Path(folder, "stdout")
        errors = Path(folder, "stderr")
        with output.open("w") as stdout, errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
                failure = f"exit status {status}" if status else ""
            except subprocess.TimeoutExpired:
                failure = f"not done after {limit:.0f} s"
            finally:
                kill_group(process)
        lines = output.read_text(errors="replace").splitlines()
        last_words = errors.read_text(errors="replace").splitlines()[-LAST_LINES:]
    if failure and last_words:
        failure += f": {' '.join(last_words)}"
    return Result(part, figures_of(part, lines), failure, time.monotonic() - started)


def kill_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process and of those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def figures_of(part: str, lines: list[str]) -> list[dict]:
    """Return what a part has printed."""
    if part == "selfcheck":
        return [{"kind": "selfcheck", "line": line} for line in lines if " phases pass" in line]
    figures = []
    for line in lines:
        if line.startswith("{"):
            figures.append(json.loads(line))
    return figures


def failures(results: list[Result]) -> list[str]:
    """Return what failed, a line each."""
    lines = []
    for result in results:
        for figure in of_kind(result.figures, "failed"):
            lines.append(f"{result.part}: {figure['what']}")
        if result.failure:
            lines.append(f"{result.part}: {result.failure}")
    return lines


def report(results: list[Result], where: list[str], tiny: bool) -> str:
    """Return the tables in Markdown."""
    figures = []
    for result in results:
        figures += result.figures
    lines = ["# Measured by benchmarks/gpu.py", "", circumstances(), "", *where, ""]
    if tiny:
        lines += ["**Tiny networks, to test the program: these figures say nothing.**", ""]
    lines += step_table(figures)
    lines += peer_table(figures)
    lines += profile_tables(figures)
    lines += ["## Checks", ""]
    for figure in of_kind(figures, "rate"):
        lines.append(f"- matrix rate, {figure['precision']}: {figure['flops'] / 1e12:.3g} TFLOP/s")
    for figure in of_kind(figures, "no_wait"):
        lines.append(
            f"- {figure['model']}, {figure['precision']}: {figure['steps']} steps without waiting "
            "for the GPU"
        )
    for figure in of_kind(figures, "selfcheck"):
        lines.append(f"- selfcheck: {figure['line']}")
    for figure in of_kind(figures, "left_out"):
        lines.append(f"- left out for want of time: {figure['what']}")
    failed = [f"- {failure}" for failure in failures(results)]
    lines += ["", "## What failed", "", *(failed or ["Nothing."])]
    return "\n".join([*lines, ""])


def step_table(figures: list[dict]) -> list[str]:
    """Return the table of training steps.

    The share of the matrix rate is that of the step's matrix products and convolutions. For tests
    on a CPU the rate is that of fp32.
    """
    rates = {figure["precision"]: figure["flops"] for figure in of_kind(figures, "rate")}
    steps = of_kind(figures, "step")
    flops = {figure["model"]: figure["flops"] for figure in steps if "flops" in figure}
    rows = []
    for name, program in PROGRAMS.items():
        batches = sorted({figure["batch"] for figure in steps if figure["model"] == name})
        for figure in steps:
            if figure["model"] != name:
                continue
            precision = figure["precision"]
            share = NEVER_MEASURED
            if name in flops and precision in rates:
                share = f"{flops[name] * figure['images_per_second'] / rates[precision]:.3f}"
            compiled = "no"
            if "compile_seconds" in figure:
                compiled = f"yes ({figure['compile_seconds']:.0f} s)"
            estimate = ""
            of_recipe = figure["batch"] == batches[0] and precision == program.precision
            if of_recipe and compiled == "no":
                estimate = str(program.estimate)
            rows.append(
                (
                    name,
                    precision,
                    figure["batch"],
                    compiled,
                    f"{figure['images_per_second']:.1f}",
                    share,
                    figure["memory_mib"],
                    estimate,
                )
            )
    header = (
        "model",
        "precision",
        "batch",
        "--compile",
        "images/s",
        "share of the matrix rate",
        "MiB",
        "estimated for one H100 (counted, not measured)",
    )
    gigaflops = [f"{name} {value / 1e9:.0f}" for name, value in flops.items()]
    note = f"GFLOP an image in a step: {', '.join(gigaflops)}."
    return ["## Training steps", "", *table(header, rows), "", note, ""]


def peer_table(figures: list[dict]) -> list[str]:
    """Return the table of torchvision's detectors beside ours at the same batch and precision."""
    rows = []
    for peer in of_kind(figures, "peer"):
        peer_speed = peer["images_per_second"]
        first_cells = (
            f"torchvision {peer['peer']}",
            peer["precision"],
            peer["batch"],
            f"{peer_speed:.1f}",
        )
        for compiled in (False, True):
            name = f"{peer['model']}{' --compile' if compiled else ''}"
            ours = find_step(figures, peer, compiled)
            if ours is None:
                rows.append((*first_cells, name, NEVER_MEASURED, NEVER_MEASURED))
                continue
            speed = ours["images_per_second"]
            rows.append((*first_cells, name, f"{speed:.1f}", f"{speed / peer_speed:.2f}"))
    header = ("peer", "precision", "batch", "images/s", "ours", "images/s", "ratio to the peer")
    return ["## Beside torchvision", "", *table(header, rows), ""]


def find_step(figures: list[dict], peer: dict, compiled: bool) -> dict | None:
    """Return our step with the batch and the precision of a peer, if it was measured."""
    for figure in of_kind(figures, "step"):
        same = all(figure[name] == peer[name] for name in ("model", "precision", "batch"))
        if same and ("compile_seconds" in figure) == compiled:
            return figure
    return None


def profile_tables(figures: list[dict]) -> list[str]:
    """Return for each model where the time of a step goes."""
    lines = ["## Where the time goes", ""]
    for figure in of_kind(figures, "profile"):
        rows = []
        for name, share, times in figure["kernels"]:
            rows.append((f"`{name}`", f"{share:.3f}", times))
        header = (f"{figure['model']}, {figure['precision']}", "share", "times a step")
        lines += [*table(header, rows), ""]
    return lines


def of_kind(figures: list[dict], kind: str) -> list[dict]:
    return [figure for figure in figures if figure["kind"] == kind]


def table(header: tuple, rows: Iterable[tuple]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = []
    for cells in (header, ("---",) * len(header), *rows):
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines


if __name__ == "__main__":
    entry.run(main)
