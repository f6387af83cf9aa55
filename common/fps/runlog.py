"""The log of a run: text, JSON lines, TensorBoard events and a progress bar.

Text and JSON keep the layout of MMDetection 2.x, so that its `analyze_logs` (and that of 3.x,
which reads `step`) works on them. A killed process loses nothing it has logged.
"""

import json
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from tqdm import tqdm

from common.fps.meter import Window
from common.npu.distributed import Ranks

DATA_SHARE_LIMIT = 0.2  # of the time waiting for the loader, above which the log line says so


class RunLog:
    """Writes `train_<device_id>.log` (and stdout), `<time>.log.json`, `tensorboard/` in `folder`.

    Ranks but the main one write nothing but the exception that leaves the `with`. Call `begin`
    before `train` and `val`. `num_workers` only serves the advice on a slow loader.
    """

    def __init__(self, folder: Path, ranks: Ranks, device_id: int | str, num_workers: int = 0):
        self._ranks, self.num_workers = ranks, num_workers
        self.text_path = folder / f"train_{device_id}.log"
        self.json_path = folder / f"{datetime.now():%Y%m%d_%H%M%S}.log.json"
        self.bar, self._events = tqdm(disable=True), None
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.main:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(folder / "tensorboard"))
            except ImportError:
                self.info("no events: the package tensorboard is not installed", "WARNING")

    def header(self, **about: str | int) -> None:
        """The first JSON line: env_info, config, seed, exp_name (no `mode`: readers skip it)."""
        self._record(about, 0)
        self.info("\n".join(f"{key}: {value}" for key, value in about.items()))

    def info(self, text: str, level: str = "INFO") -> None:
        if self._ranks.main:
            with tqdm.external_write_mode():  # takes the bar away meanwhile
                print(self._write(level, text), flush=True)

    def begin(self, steps: int, done: int, per_epoch: int) -> None:
        """The run has `steps`, `done` of them behind us; `bar` shows on a terminal only."""
        self._steps, self._per_epoch = steps, per_epoch
        self.bar = tqdm(total=steps, initial=done, disable=None if self._ranks.main else True)

    def train(self, step: int, lr: float, losses: dict, window: Window, memory_mib: int) -> None:
        """The line after `step` steps of the run; `losses` are means, the total `loss` last."""
        epoch, iter = (step - 1) // self._per_epoch + 1, (step - 1) % self._per_epoch + 1
        entry = {"mode": "train", "epoch": epoch, "iter": iter, "lr": lr, "memory": memory_mib}
        entry |= {"data_time": window.data_time, **losses, "time": window.time, "fps": window.fps}
        self._record(entry | {"step": step}, step)
        eta = (self._steps - step) * window.time * window.fps / window.fps_average
        text = (
            f"Epoch [{epoch}][{iter}/{self._per_epoch}]\tlr: {lr:.3e}, "
            f"eta: {timedelta(seconds=int(eta))}, time: {window.time:.3f}, "
            f"data_time: {window.data_time:.3f}, memory: {memory_mib}, {_fields(losses)}, "
            f"fps: {window.fps:.2f}, fps_avg: {window.fps_average:.2f}"
            f"{' (warm-up)' if window.warming_up else ''}, "
            f"data_wait: {window.data_time * window.steps:.1f} s"
        )
        if (share := window.data_time / window.time) > DATA_SHARE_LIMIT:
            text += f" ({share:.0%} of the time: raise --num_workers (now {self.num_workers}), "
            text += "put the data on a local disk, leave this run more CPU cores)"
        self.info(text)

    def val(self, step: int, lr: float, metrics: dict[str, float | str]) -> None:
        """The line of an evaluation after `step` steps."""
        epoch, iter = -(-step // self._per_epoch), self._per_epoch
        self._record({"mode": "val", "epoch": epoch, "iter": iter, "lr": lr, **metrics}, step)
        self.info(f"Epoch(val) [{epoch}][{iter}]\t{_fields(metrics)}")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()
        with suppress(OSError):  # of a full disk: `error` is the one to be told
            if error is not None:
                self._write("ERROR", f"rank {self._ranks.rank}: {kind.__name__}: {error}")
            if self._events is not None:
                self._events.close()

    def _write(self, level: str, text: str) -> str:
        stamp = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
        line = f"{stamp} - onestage - {level} - {text}"
        _append(self.text_path, line)
        return line

    def _record(self, entry: dict, step: int) -> None:
        """A JSON line, floats to 5 decimals (a learning rate in full), and its events."""
        if not self._ranks.main:
            return
        floats = {key: value for key, value in entry.items() if isinstance(value, float)}
        rounded = {key: round(value, 5) for key, value in floats.items() if key != "lr"}
        _append(self.json_path, json.dumps(entry | rounded, allow_nan=False))
        if self._events is not None:
            for name, value in floats.items():
                self._events.add_scalar(f"{entry['mode']}/{name}", value, step)
            self._events.flush()


def _append(path: Path, line: str) -> None:
    with path.open("ab", buffering=0) as file:  # ranks share the text: a line is one write
        file.write(f"{line}\n".encode())


def _fields(values: dict[str, float | str]) -> str:
    return ", ".join(f"{k}: {v if isinstance(v, str) else f'{v:.4f}'}" for k, v in values.items())
