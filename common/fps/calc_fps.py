"""FPS of a run from its JSON log: `python3 -m common.fps.calc_fps X.log.json GPU_NUMS BATCH_SIZE`.

The original's rule: a train line with `iter` above 50 has the rate devices * batch / time, an epoch
(closed by its val line) their mean, the last line printed is the mean over epochs. Beyond it: a log
without val lines is one epoch, and an epoch without a line beyond iteration 50 counts them all.
"""

import argparse
import json
import sys
from pathlib import Path

from common.errors import UserError

SKIPPED_ITERATIONS = 50  # of every epoch: worker start and warm-up


def read_json_log(path: str | Path) -> list[dict]:
    """All whole lines of a `.log.json`; UserError if it is missing or something else."""
    try:
        text = Path(path).read_text()  # whose last line a full disk or lost power may have cut
        # dict() refuses JSON that is no object.
        return [dict(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path} as the .log.json of a run: {error}") from error


def fps_per_epoch(lines: list[dict], gpu_nums: int, batch_size: int) -> list[float]:
    """Images a second of each epoch that a val line closes (of the whole log if none does).

    `batch_size` is that of one device. UserError if there is no train line to measure.
    """
    epochs, rates = [], []
    for line in lines:
        if line.get("mode") == "train":
            rates.append((line["iter"], gpu_nums * batch_size / line["time"]))
        elif line.get("mode") == "val" and rates:
            epochs.append(rates)
            rates = []
    if not epochs and not rates:
        raise UserError("the log has no train line: let the run reach its first log interval")
    return [_mean(rates) for rates in epochs or [rates]]


def _mean(rates: list[tuple[int, float]]) -> float:
    warm = [rate for iter, rate in rates if iter > SKIPPED_ITERATIONS] or [r for _, r in rates]
    return sum(warm) / len(warm)


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
    for number, mean in enumerate(means, 1):
        print({"epoch": number, "fps": mean})
    print({"fps": sum(means) / len(means)})


if __name__ == "__main__":
    main()
