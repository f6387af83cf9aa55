"""FPS of a run from its JSON log: `python3 -m common.fps.calc_fps X.log.json GPU_NUMS BATCH_SIZE`.

The original's rule: a train line with `iter` above 50 has the rate devices * batch / time, an epoch
(closed by its val line) their mean, the last line printed is the mean over epochs. Beyond it: a log
without val lines is one epoch, and an epoch without a line beyond iteration 50 counts them all.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from common.errors import UserError

SKIPPED_ITERATIONS = 50  # of every epoch: worker start and warm-up


class Rate(NamedTuple):
    """What a train line says."""

    iteration: int  # of the epoch
    fps: float


def read_json_log(path: str | Path) -> list[dict]:
    """Return all whole lines of a `.log.json`.

    A full disk or a lost machine may have cut the last one. Raise UserError where the file is
    missing or something else.
    """
    try:
        text = Path(path).read_text()
        end_of_last_whole_line = text.rfind("\n") + 1
        lines = []
        for line in text[:end_of_last_whole_line].splitlines():
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError(f"{line:.40} is no JSON object")
            lines.append(entry)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as the .log.json of a run: {error}") from error
    return lines


def fps_per_epoch(lines: list[dict], gpu_nums: int, batch_size: int) -> list[float]:
    """Return the images a second of each epoch that a val line closes, else of the whole log.

    `batch_size` is that of one device. Raise UserError where there is no train line to measure.
    """
    epochs = []
    rates = []
    for line in lines:
        if line.get("mode") == "train":
            fps = gpu_nums * batch_size / line["time"]
            rates.append(Rate(line["iter"], fps))
        elif line.get("mode") == "val" and rates:
            epochs.append(rates)
            rates = []
    if not epochs:
        epochs.append(rates)
    if not epochs[0]:
        raise UserError("the log has no train line: let the run reach its first log interval")
    return [mean_fps(rates) for rates in epochs]


def mean_fps(rates: list[Rate]) -> float:
    """Return the mean without the warm-up; with it where there is nothing else."""
    warm = [rate.fps for rate in rates if rate.iteration > SKIPPED_ITERATIONS]
    if not warm:
        warm = [rate.fps for rate in rates]
    return fmean(warm)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="calc_fps.py", description="FPS of a run from its log.")
    parser.add_argument("log", metavar="xxx.log.json")
    parser.add_argument("gpu_nums", metavar="GPU_NUMS", type=int, help="devices of the run")
    parser.add_argument("batch_size", metavar="BATCH_SIZE", type=int, help="images a device")
    args = parser.parse_args(argv)
    try:
        means = fps_per_epoch(read_json_log(args.log), args.gpu_nums, args.batch_size)
    except UserError as error:
        sys.exit(f"error: {error}")
    for epoch, mean in enumerate(means, 1):
        print({"epoch": epoch, "fps": mean})
    print({"fps": fmean(means)})


if __name__ == "__main__":
    main()
