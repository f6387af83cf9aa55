"""The log of a run: text, JSON lines, TensorBoard events and a progress bar.

Text and JSON keep the layout of MMDetection 2.x, so that its `analyze_logs` (and that of 3.x,
which reads `step`) works on them. A killed process loses nothing it has logged.
"""

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.arithmetic import ceil_div
from common.errors import UserError
from common.files import cannot_be_written, encoded
from common.fps.meter import Window
from common.npu.distributed import Ranks
from common.npu.terminal import drop

DATA_SHARE_LIMIT = 0.2  # of the time waiting for the loader, above which the log line has advice
LINE_LENGTH = 100  # of the header's paragraphs in the text log
DECIMALS = 5  # of numbers in the JSON log, as MMDetection writes them; a rate is written in full


class RunLog:
    """Writes `train_<name>.log` (and stdout), `<time>.log.json`, `tensorboard/` in a folder.

    Until `open` names the folder, lines go to stdout and wait for the file. Ranks but the main one
    write nothing but the exception that leaves the `with`. Call `begin` before `train` and `val`.
    `num_workers` only serves the advice on a slow loader.
    """

    def __init__(self, ranks: Ranks, num_workers: int = 0):
        self.ranks = ranks
        self.num_workers = num_workers
        self.bar = tqdm(disable=True)
        self.text_path: Path | None = None
        self.json_path: Path | None = None
        self._waiting_lines: list[str] = []
        self._events = None
        self._steps = 0
        self._per_epoch = 1

    def open(self, folder: Path, name: int | str, first_step: int = 1) -> None:
        """Begin the files in `folder`, with the lines logged so far.

        `first_step` is the first one of this run, from 1: a resumed run takes the place of what an
        earlier one has left in TensorBoard's events of that step and later ones.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.text_path = folder / f"train_{name}.log"
        self.json_path = _new_json_path(folder)
        for line in self._waiting_lines:
            _append(self.text_path, line)
        self._waiting_lines.clear()
        if self.ranks.main:
            self._open_events(folder / "tensorboard", first_step)

    def _open_events(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.warning("no events: the package tensorboard is not installed")
        else:
            try:
                str(folder).encode()
            except UnicodeEncodeError:
                self.warning(
                    f"no events: tensorboard needs a path in UTF-8, not {folder}; rename it, or "
                    "set LC_ALL=C.UTF-8"
                )
                return
            purge_step = first_step if first_step > 1 else None
            self._events = SummaryWriter(str(folder), purge_step=purge_step)

    def header(self, **about: str | int) -> None:
        """Write the first JSON line: env_info, config, seed, exp_name, ranks, first_step.

        Readers of the log skip it because it has no `mode`. `header_of_step` reads it. The text log
        has the lines of a value as one paragraph.
        """
        self._record(about, step=0)
        paragraphs = []
        for key, value in about.items():
            values = ", ".join(str(value).splitlines())
            paragraph = textwrap.fill(
                f"{key}: {values}",
                LINE_LENGTH,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            paragraphs.append(paragraph)
        self.info("\n".join(paragraphs))

    def info(self, text: str) -> None:
        self._say("INFO", text)

    def warning(self, text: str) -> None:
        self._say("WARNING", text)

    def warn_of(self, file: str, findings: Iterable[str]) -> None:
        """Log what was noticed about a file, a line each."""
        for finding in findings:
            self.warning(f"{file}: {finding}")

    def begin(self, steps: int, done: int, per_epoch: int) -> None:
        """Show the bar, on a terminal only: `done` of the run's `steps` are behind it."""
        self._steps = steps
        self._per_epoch = per_epoch
        disable = None if self.ranks.main else True  # None: tqdm shows it on terminals
        self.bar = tqdm(total=steps, initial=done, disable=disable)

    def train(
        self, step: int, lr: float, losses: dict[str, float], window: Window, memory_mib: int
    ) -> None:
        """Write the line after `step` steps of the run.

        `losses` are means over the window: the total `loss` after its summands.
        """
        epoch = ceil_div(step, self._per_epoch)
        iteration = step - (epoch - 1) * self._per_epoch
        entry = {
            "mode": "train",
            "epoch": epoch,
            "iter": iteration,
            "lr": lr,
            "memory": memory_mib,
            "data_time": window.data_time,
            **losses,
            "time": window.time,
            "fps": window.fps,
            "step": step,
        }
        self._record(entry, step)
        images_a_step = window.time * window.fps
        seconds_a_step = images_a_step / window.fps_average
        eta = timedelta(seconds=int((self._steps - step) * seconds_a_step))
        warm_up = " (warm-up)" if window.warming_up else ""
        text = (
            f"Epoch [{epoch}][{iteration}/{self._per_epoch}]\tlr: {lr:.3e}, eta: {eta}, "
            f"time: {window.time:.3f}, data_time: {window.data_time:.3f}, memory: {memory_mib}, "
            f"{_fields(losses)}, fps: {window.fps:.2f}, "
            f"fps_avg: {window.fps_average:.2f}{warm_up}, "
            f"data_wait: {window.data_time * window.steps:.1f} s"
        )
        self.info(text + self._advice_on_loader(window))

    def _advice_on_loader(self, window: Window) -> str:
        share = window.data_time / window.time
        if share <= DATA_SHARE_LIMIT:
            return ""
        return (
            f" ({share:.0%} of the time: raise --num_workers (now {self.num_workers}), "
            "put the data on a local disk, leave this run more CPU cores)"
        )

    def val(self, step: int, lr: float, metrics: dict[str, float | str]) -> None:
        """Write the line of an evaluation after `step` steps."""
        epoch = ceil_div(step, self._per_epoch)
        entry = {
            "mode": "val",
            "epoch": epoch,
            "iter": self._per_epoch,
            "lr": lr,
            **metrics,
            # Not "step": MMDetection 3.x would count it as one of a train line.
            "steps_done": step,
        }
        self._record(entry, step)
        self.info(f"Epoch(val) [{epoch}][{self._per_epoch}]\t{_fields(metrics)}")

    def add_events(self, step: int, figures: Mapping[str, float], pictures: Iterable[Path]) -> None:
        """Write figures by their tags, and pictures (PNG files), to TensorBoard's events only.

        A figure below 0 is none: COCO's metrics are -1 where there is no ground truth for them.
        """
        if self._events is None:
            return
        for tag, value in figures.items():
            if value >= 0:
                self._events.add_scalar(tag, value, step)
        for path in pictures:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._events.add_image(f"pictures/{path.stem}", pixels, step, dataformats="HWC")
        self._events.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()
        with suppress(OSError, UserError):  # of a full disk: the first error is the one to report
            if error is not None:
                self._write("ERROR", f"rank {self.ranks.rank}: {kind.__name__}: {error}")
            if self._events is not None:
                self._events.close()

    def _say(self, level: str, text: str) -> None:
        if self.ranks.main:
            line = self._write(level, text)
            try:
                with tqdm.external_write_mode():  # takes the bar away meanwhile
                    print(line, flush=True)
            except OSError:  # such as a full disk; the file has the line already
                drop(sys.stdout)

    def _write(self, level: str, text: str) -> str:
        stamp = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
        line = f"{stamp} - onestage - {level} - {text}"
        if self.text_path is None:
            self._waiting_lines.append(line)
        else:
            _append(self.text_path, line)
        return line

    def _record(self, entry: dict, step: int) -> None:
        """Write a JSON line, and its floating-point numbers as TensorBoard events."""
        if not self.ranks.main:
            return
        rounded = {}
        for key, value in entry.items():
            if isinstance(value, float) and key != "lr":
                value = round(value, DECIMALS)
            rounded[key] = value
        _append(self.json_path, json.dumps(rounded, allow_nan=False))
        if self._events is not None:
            for key, value in entry.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{entry['mode']}/{key}", value, step)
            self._events.flush()


def header_of_step(folder: Path, step: int) -> dict | None:
    """Return the header of the process of a run that did a step, from 1, as `header` wrote it.

    Of several, as of a run that was resumed from an earlier step, it is the last one. Return None
    where the folder has no log of it.
    """
    newest = None
    for path in sorted(folder.glob("*.log.json")):
        with path.open(encoding="utf-8") as file:
            line = file.readline()
        try:
            about = json.loads(line)
        except ValueError:  # of a process that was killed while it wrote
            continue
        if isinstance(about, dict) and about.get("first_step", 1) <= step:
            newest = about
    return newest


def _new_json_path(folder: Path) -> Path:
    """Return the path of a JSON log that is not there yet, named by the time in seconds.

    A run that begins in the second of another one has the name of a later second: the names are in
    the order of the runs.
    """
    moment = datetime.now()
    path = folder / f"{moment:%Y%m%d_%H%M%S}.log.json"
    while path.exists():
        moment += timedelta(seconds=1)
        path = folder / f"{moment:%Y%m%d_%H%M%S}.log.json"
    return path


def _append(path: Path, line: str) -> None:
    try:
        with path.open("ab", buffering=0) as file:  # ranks share the text: a line is one write
            file.write(encoded(f"{line}\n"))
    except OSError as error:
        raise cannot_be_written(path, error) from None


def _fields(values: dict[str, float | str]) -> str:
    texts = []
    for key, value in values.items():
        if not isinstance(value, str):
            value = f"{value:.4f}"
        texts.append(f"{key}: {value}")
    return ", ".join(texts)
