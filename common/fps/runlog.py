"""The log of a run: text, JSON lines, TensorBoard events and a progress bar.

Text and JSON lines keep the layout of MMDetection 2.x, so that its `analyze_logs` (and that of
3.x, which reads `step`) works on them. Every line is one unbuffered write: a killed process
loses nothing it has logged.
"""

import json
import math
from datetime import datetime, timedelta
from pathlib import Path

from tqdm import tqdm

from common.fps.meter import Window

DATA_SHARE_LIMIT = 0.2  # of the time waiting for the loader, above which the log warns
LINES_BETWEEN_WARNINGS = 10


class RunLog:
    """Writes `train_<device_id>.log`, `<timestamp>.log.json` and `tensorboard/` in `folder`.

    Text also goes to stdout. With `main=False` (every rank but one) nothing is written but the
    exception that leaves the `with`. `append=True` (a resumed run) goes on with the text log; the
    JSON log of each start is a new file. `num_workers` only serves the loader warning.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device_id: int | str,
        main: bool = True,
        append: bool = False,
        rank: int = 0,
        num_workers: int = 0,
    ):
        self.folder = Path(folder)
        self.text_path = self.folder / f"train_{device_id}.log"
        self.json_path = self.folder / f"{_free_stamp(self.folder)}.log.json"
        self._main, self._rank, self.num_workers = main, rank, num_workers
        self._json = self._events = None
        self._bar = tqdm(disable=True)
        self._quiet_lines = 0  # until the loader may be complained of again
        if not main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not append:
            self.text_path.write_bytes(b"")
        self._json = self.json_path.open("xb", buffering=0)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.warning("no TensorBoard events: the package tensorboard is not installed")
        else:
            self._events = SummaryWriter(str(self.folder / "tensorboard"))

    def header(self, env_info: str, config: str, seed: int, exp_name: str) -> None:
        """The first JSON line (no `mode`, no `epoch`: readers skip it) and its text."""
        self._write_json(
            {"env_info": env_info, "config": config, "seed": seed, "exp_name": exp_name}
        )
        self.info(f"Environment info:\n{env_info}")
        self.info(f"Config:\n{config}")
        self.info(f"Exp name: {exp_name}, seed: {seed}")

    def info(self, text: str) -> None:
        self._write_text("INFO", text)

    def warning(self, text: str) -> None:
        self._write_text("WARNING", text)

    def train(
        self,
        epoch: int,
        iter: int,
        step: int,
        iters_per_epoch: int,
        lr: float,
        losses: dict[str, float],
        window: Window,
        eta_seconds: float,
        memory_mib: int | None = None,
    ) -> None:
        """One line of training: `epoch`, `iter` (within the epoch) and `step` (of the run) from 1.

        `losses` are the window's mean terms, among them the total, `loss`.
        """
        terms = _ordered(losses)
        memory = {} if memory_mib is None else {"memory": memory_mib}
        scalars = {"lr": lr, **memory, "data_time": window.data_time, **terms}
        scalars |= {"time": window.time, "fps": window.fps}
        about = {"mode": "train", "epoch": epoch, "iter": iter}
        self._write_json(about | scalars | {"step": step})
        self._write_events("train", step, scalars)
        fields = [
            f"lr: {lr:.3e}",
            f"eta: {timedelta(seconds=int(eta_seconds))}",
            f"time: {window.time:.3f}",
            f"data_time: {window.data_time:.3f}",
            *(f"{name}: {value}" for name, value in memory.items()),
            *(f"{name}: {value:.4f}" for name, value in terms.items()),
            f"fps: {window.fps:.2f}",
            f"fps_avg: {window.fps_average:.2f}" + (" (warm-up)" if window.warming_up else ""),
            f"data_wait: {window.data_time * window.steps:.1f} s",
        ]
        self.info(f"Epoch [{epoch}][{iter}/{iters_per_epoch}]\t" + ", ".join(fields))
        if window.data_share > DATA_SHARE_LIMIT and self._quiet_lines <= 0:
            self._quiet_lines = LINES_BETWEEN_WARNINGS
            self.warning(
                f"the device waits for the loader {window.data_share:.0%} of the time: raise "
                f"--num_workers (now {self.num_workers}), put the data on a local disk, "
                "leave this run more CPU cores"
            )
        self._quiet_lines -= 1

    def val(self, epoch: int, iter: int, lr: float, metrics: dict[str, float | str]) -> None:
        """One line of evaluation after `epoch` epochs of `iter` iterations each."""
        self._write_json({"mode": "val", "epoch": epoch, "iter": iter, "lr": lr, **metrics})
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        fields = (f"{k}: {v:.4f}" if k in numbers else f"{k}: {v}" for k, v in metrics.items())
        self.info(f"Epoch(val) [{epoch}][{iter}]\t" + ", ".join(fields))
        self._write_events("val", epoch * iter, numbers)

    def progress(self, total: int, done: int = 0) -> None:
        """Show a bar over `total` steps, `done` of them behind us, if stderr is a terminal."""
        hidden = None if self._main else True  # None: by whether stderr is a terminal
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=hidden)

    def advance(self, steps: int = 1) -> None:
        self._bar.update(steps)

    def close(self) -> None:
        """Close bar, events and JSON log; lines of text may still follow."""
        for part in (self._bar, self._events, self._json):
            if part is not None:
                part.close()
        self._events = self._json = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Close; what ended the run, if anything did, goes to the text file."""
        self.close()
        if error is not None:
            self._append("ERROR", f"rank {self._rank}: {type(error).__name__}: {error}")

    def _append(self, level: str, text: str) -> str:
        now = datetime.now()
        stamp = f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d}"
        line = f"{stamp} - onestage - {level} - {text}\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.text_path.open("ab", buffering=0) as log:  # ranks share the file: append at once
            log.write(line.encode())
        return line

    def _write_text(self, level: str, text: str) -> None:
        if self._main:
            line = self._append(level, text)
            with tqdm.external_write_mode():  # takes the bar away meanwhile
                print(line, end="", flush=True)

    def _write_json(self, entry: dict) -> None:
        if self._json is not None:
            entry = {key: _plain(key, value) for key, value in entry.items()}
            self._json.write((json.dumps(entry, allow_nan=False) + "\n").encode())

    def _write_events(self, group: str, step: int, scalars: dict[str, float]) -> None:
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(f"{group}/{name}", value, step)
            self._events.flush()


def _free_stamp(folder: Path) -> str:
    """The time now, or the first second after it that no earlier start has taken."""
    now = datetime.now()
    while (folder / f"{now:%Y%m%d_%H%M%S}.log.json").exists():
        now += timedelta(seconds=1)
    return f"{now:%Y%m%d_%H%M%S}"


def _ordered(losses: dict[str, float]) -> dict[str, float]:
    """`loss_cls` and `loss_bbox` first, the total last, other terms between as they came."""
    rank = {"loss_cls": 0, "loss_bbox": 1, "loss": 3}
    return {name: losses[name] for name in sorted(losses, key=lambda name: rank.get(name, 2))}


def _plain(key: str, value):
    """Floats to 5 decimals (a learning rate in full); JSON has no NaN or infinity: null."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if key == "lr" else round(value, 5)
