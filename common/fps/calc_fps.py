"""FPS of a run from its JSON log: `python3 -m common.fps.calc_fps X.log.json GPU_NUMS BATCH_SIZE`.

The original's rule: a train line with `iter` above 50 has the rate devices * batch / time, an epoch
(closed by its val line) their mean, the last line printed is the mean over epochs. Beyond it: a log
without val lines is one epoch, and an epoch without a line beyond iteration 50 counts them all.
The log may be one of this project, of MMDetection 2.x (`<time>.log.json`) or of MMDetection 3.x and
mmengine (`vis_data/scalars.json`, `vis_data/<time>.json`).
"""

import json
import math
import sys
from argparse import ArgumentTypeError
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from common.errors import UserError
from common.parser import Parser

SKIPPED_ITERATIONS = 50  # of every epoch: worker start and warm-up


class Rate(NamedTuple):
    """What a train line says."""

    iteration: int  # of the epoch
    fps: float


def read_json_log(path: str | Path) -> list[dict]:
    """Return all whole lines of a `.log.json` in the form of MMDetection 2.x.

    A full disk or a lost machine may have cut the last one. Raise UserError where the file is
    missing or something else.
    """
    try:
        texts = Path(path).read_text().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as the .log.json of a run: {error}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            entry = json.loads(text)
        except ValueError as error:
            if not text.endswith("\n"):
                break
            raise UserError(
                f"cannot read {path} as the .log.json of a run: line {number}: {error}"
            ) from error
        if not isinstance(entry, dict):
            raise UserError(
                f"cannot read {path} as the .log.json of a run: line {number} is no JSON object "
                f"but {text.strip():.40}"
            )
        lines.append(entry)
    return with_modes(lines)


def with_modes(lines: list[dict]) -> list[dict]:
    """Return the lines with mmengine's train and val lines in the form of MMDetection 2.x.

    mmengine writes no `mode`. Its train lines count iterations on from epoch to epoch; here they
    are counted from the beginning of the epoch. Where its log has a hierarchy, the names begin with
    `train/`.
    """
    iterations_before = _iterations_before_epochs(lines)
    converted = []
    for line in lines:
        if is_train_line_of_mmengine(line):
            changes = {
                "mode": "train",
                "iter": line["step"] - iterations_before[line.get("epoch")],
                "time": line.get("time", line.get("train/time")),
            }
            converted.append(line | changes)
        elif "mode" not in line and "step" in line:
            converted.append(line | {"mode": "val"})
        else:
            converted.append(line)
    return converted


def is_train_line_of_mmengine(line: dict) -> bool:
    """Return whether a line is one of training; those of an evaluation have `step` only."""
    if "mode" in line or not isinstance(line.get("step"), int):
        return False
    if not isinstance(line.get("epoch"), int | None):
        return False
    # Those of early versions have no `iter`, those of a run without epochs no `epoch`.
    return any(name in line for name in ("iter", "epoch", "lr", "train/lr"))


def _iterations_before_epochs(lines: list[dict]) -> dict[int | None, int]:
    """Return how many iterations of mmengine's log lie before each epoch, by the epoch's number.

    The first line of an epoch is one log interval after its beginning. A run that counts no epochs
    has the number None for all its lines.
    """
    train_lines = [line for line in lines if is_train_line_of_mmengine(line)]
    if not train_lines:
        return {}
    first_line = train_lines[0]
    gaps = [0]
    for line, next_line in pairwise(train_lines):
        if line.get("epoch") == next_line.get("epoch"):
            gaps.append(next_line["step"] - line["step"])
    # The first line of a whole log shows the interval; a resumed run begins later. The last gap of
    # an epoch may be shorter than the interval.
    interval = max(gaps)
    if first_line.get("epoch") == 1:
        interval = first_line["step"]
    before = {}
    for line in train_lines:
        before.setdefault(line.get("epoch"), line["step"] - interval)
    if None in before:
        before[None] = 0
    return before


def fps_per_epoch(lines: list[dict], gpu_nums: int, batch_size: int) -> list[float]:
    """Return the images a second of each epoch that a val line closes, else of the whole log.

    `lines` are in the form of MMDetection 2.x, `batch_size` is that of one device. Raise UserError
    where there is no train line to measure, or one without a time above 0.
    """
    epochs = []
    rates = []
    for line in lines:
        if line.get("mode") == "train":
            rates.append(rate_of(line, gpu_nums * batch_size))
        elif line.get("mode") == "val" and rates:
            epochs.append(rates)
            rates = []
    if not epochs:
        epochs.append(rates)
    if not epochs[0]:
        raise UserError("the log has no train line: let the run reach its first log interval")
    return [mean_fps(rates) for rates in epochs]


def rate_of(line: dict, images: int) -> Rate:
    """Return what a train line says about a step of so many images.

    Raise UserError where the line has no iteration or no time above 0.
    """
    iteration = line.get("iter")
    if not isinstance(iteration, int):
        raise UserError(f"a train line has the iter {iteration}, not a whole number")
    time = line.get("time")
    is_number = isinstance(time, int | float) and not isinstance(time, bool)
    if not is_number or not 0 < time < math.inf or not math.isfinite(images / time):
        raise UserError(
            f"the train line of epoch {line.get('epoch')}, iter {iteration} has the time {time}; "
            "give a log whose lines have the seconds of an iteration"
        )
    return Rate(iteration, images / time)


def mean_fps(rates: list[Rate]) -> float:
    """Return the mean without the warm-up; with it where there is nothing else."""
    warm = [rate.fps for rate in rates if rate.iteration > SKIPPED_ITERATIONS]
    if not warm:
        warm = [rate.fps for rate in rates]
    return fmean(warm)


def at_least_one(text: str) -> int:
    """Return the number that a text is, for argparse; raise its error for less than 1."""
    try:
        number = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text}: give a whole number from 1 on") from None
    if number < 1:
        raise ArgumentTypeError(f"{number}: give at least 1")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="calc_fps.py", description="FPS of a run from its log.")
    parser.add_argument("log", metavar="xxx.log.json")
    parser.add_argument(
        "gpu_nums", metavar="GPU_NUMS", type=at_least_one, help="devices of the run"
    )
    parser.add_argument(
        "batch_size", metavar="BATCH_SIZE", type=at_least_one, help="images a device"
    )
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
