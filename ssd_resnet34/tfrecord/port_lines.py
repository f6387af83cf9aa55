"""The lines that scripts around the TensorFlow port look for, which every rank prints."""

import os
import time
from datetime import datetime

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.fps.progress import Progress
from common.fps.window import LossWindow


def announce(text: str) -> None:
    """Print a line as the TensorFlow port does, behind `] `."""
    stamp = f"I{datetime.now():%m%d %H:%M:%S.%f} {os.getpid()}"
    with tqdm.external_write_mode():
        print(f"{stamp} ssd_main.py] {text}", flush=True)


class PortLines:
    """Prints, with each log line of the run, the step and this rank's speed, rate and loss.

    The loss is that of the last step alone, with the weight-decay term, as in the TensorFlow port.
    """

    def __init__(self, progress: Progress, device: torch.device):
        self.progress = progress
        self.device = device
        self._losses: dict[int, LossWindow] = {}  # by steps done, on their way from the device
        self._last_steps = 0
        self._last_time: float | None = None

    def add(self, step: int, loss: Tensor, image_ids: Tensor) -> None:
        """Keep the loss (0-dim, on the device) of a step after which a log line follows."""
        window = LossWindow(("loss",), self.device)
        window.add(step, {"loss": loss}, image_ids)
        self._losses[step + 1] = window.fetch()

    def print_logged(self) -> None:
        """Print the lines of the step that the run has logged since the last call, if any."""
        steps = self.progress.logged_at
        window = self._losses.pop(steps, None)
        if window is None:
            return
        now = time.perf_counter()
        announce(f"global_step...{steps}")
        if self._last_time is not None:
            images = (steps - self._last_steps) * self.progress.images_per_step
            images_a_second = images / (now - self._last_time)
            # As there: six digits of the speed, and the shortest text of a float32.
            lr = np.float32(self.progress.lr(steps - 1))
            loss = np.float32(window.means()["loss"])
            announce(f"FPS: {images_a_second:g}, learning rate: {lr!s}, loss: {loss!s}")
        self._last_steps = steps
        self._last_time = now
