"""FPS of a run from its JSON log: `python3 -m common.fps.calc_fps X.log.json GPU_NUMS BATCH_SIZE`.

The rule of the original script: of every train line with `iter` above 50 the rate is
devices * batch / time; an epoch's figure is the mean of its rates and is printed at its val line;
the last line printed is the mean over epochs. What the original could not report it reports, too:
a run without val lines counts as one epoch, and an epoch without a line beyond iteration 50 is
taken from all its lines but the first.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.npu.errors import UserError

SKIPPED_ITERATIONS = 50  # of every epoch: worker start and warm-up


def read_json_log(path: str | Path) -> list[dict]:
    """All lines of a `.log.json`; UserError if it is missing, empty or broken."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the log {path}: {error}") from error
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number} is not a JSON object; pass a .log.json")
        entries.append(entry)
    if not entries:
        raise UserError(f"{path} is empty: pass the .log.json of a run that has begun")
    return entries


def fps_per_epoch(lines: Iterable[dict], gpu_nums: int, batch_size: int) -> list[float]:
    """Images a second of each epoch that a val line closes (of the whole log if none does).

    `lines` are the parsed lines of a log, `batch_size` is that of one device. UserError if there
    is no train line to measure.
    """
    epochs: list[list[dict]] = [[]]
    for line in lines:
        if line.get("mode") == "train":
            epochs[-1].append(line)
        elif line.get("mode") == "val" and epochs[-1]:
            epochs.append([])
    closed = epochs[:-1] or epochs
    if not closed[0]:
        raise UserError("the log has no train line: let the run reach its first log interval")
    return [_epoch_fps(epoch, gpu_nums * batch_size) for epoch in closed]


def _epoch_fps(lines: list[dict], images_per_step: int) -> float:
    try:
        warm = [line for line in lines if line["iter"] > SKIPPED_ITERATIONS]
        if not warm:
            epoch = f"epoch {lines[0].get('epoch', '?')}"
            reason = f"no line beyond iteration {SKIPPED_ITERATIONS}, taking all but the first"
            print(f"{epoch}: {reason}", file=sys.stderr)
            warm = lines[1:] or lines
        rates = [images_per_step / line["time"] for line in warm]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"a train line lacks a usable `iter` or `time` ({error!r})") from error
    return sum(rates) / len(rates)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calc_fps.py", description="FPS of a run from its log.")
    parser.add_argument("log", metavar="xxx.log.json")
    parser.add_argument("gpu_nums", metavar="GPU_NUMS", type=int, help="devices of the run")
    parser.add_argument("batch_size", metavar="BATCH_SIZE", type=int, help="images a device")
    args = parser.parse_args(argv)
    if min(args.gpu_nums, args.batch_size) < 1:
        parser.error("GPU_NUMS and BATCH_SIZE count from 1")
    try:
        lines = read_json_log(args.log)
        means = fps_per_epoch(lines, args.gpu_nums, args.batch_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if any(line.get("mode") == "val" for line in lines):
        for number, mean in enumerate(means, 1):
            print({"epoch": number, "fps": mean})
    print({"fps": sum(means) / len(means)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
