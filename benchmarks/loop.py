"""The loop of a train.py, driven a step at a time, for measurements and tests."""

import queue
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from common.fps.progress import Progress
from common.fps.window import LossWindow
from common.npu import run as run_module
from common.npu.precision import Precision
from common.npu.run import RunState

NEVER_STOPPED = mock.Mock(**{"return_value.agreed.return_value": False})


class TrainingLoop:
    """`train.main`, waiting before each step until `step` gives it a batch.

    It is the program itself, in a thread of its own, with `recipe` as its only preset and `flags`
    on its command line; nothing is evaluated. `precision` replaces the one that the flags
    would give. Use it in a `with`. `state` is the program's RunState, from which the network, the
    optimizer and the run are reached; `loader` is its loader.
    """

    def __init__(
        self,
        train: ModuleType,
        recipe,
        flags: Sequence[str],
        precision: Precision | None = None,
    ):
        self.state: RunState | None = None
        self.loader = None
        self._train = train
        self._recipe = recipe
        self._flags = list(flags)
        self._precision = precision
        self._orders = queue.Queue()
        self._results = queue.Queue()
        self._threads = torch.get_num_threads()
        self._stack = ExitStack()

    def __enter__(self) -> "TrainingLoop":
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self._flags += [f"--output_dir={Path(folder, 'run')}", "--num_workers=0"]
        for patch in self._patches():
            self._stack.enter_context(patch)
        self._thread = threading.Thread(target=self._run_main, daemon=True)
        self._thread.start()
        try:
            self._result()  # the program waits for its first batch
        except BaseException:
            # `with` calls __exit__ only if __enter__ succeeds, and the patches must not stay.
            self._stack.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._orders.put(None)
        self._thread.join()
        self._stack.close()

    def _patches(self) -> list[AbstractContextManager]:
        preset = {"driven": self._recipe, "finetune": self._recipe}

        def steps(progress: Progress, loader) -> Iterator[tuple[int, object]]:
            return self._steps(progress, loader)

        patches = [
            mock.patch.object(self._train, "RECIPES", preset),
            mock.patch.object(Progress, "steps", steps),
            mock.patch.object(Progress, "finish"),
            # Signals can be handled in the main thread only.
            mock.patch.object(run_module, "StopRequest", NEVER_STOPPED),
            mock.patch.object(self._train, "RunState", self._keep_state),
        ]
        options = sys.modules.get(f"{self._train.__package__}.options")
        if options is not None:  # where the TFRecord recipe parses its flags
            patches.append(mock.patch.object(options, "RECIPES", preset))
        if self._precision is not None:
            give_precision = mock.Mock(return_value=self._precision)
            patches.append(mock.patch.object(run_module, "Precision", give_precision))
        return patches

    def _keep_state(self, *arguments, **named) -> RunState:
        self.state = RunState(*arguments, **named)
        return self.state

    def _run_main(self) -> None:
        torch.set_num_threads(self._threads)  # each thread has a number of its own
        try:
            self._train.main(self._flags)
        except BaseException as error:
            self._results.put(error)

    def _steps(self, progress: Progress, loader) -> Iterator[tuple[int, object]]:
        """Stand for `Progress.steps`: yield the batches that are given to `step`."""
        self.loader = loader
        self._results.put({})
        while True:
            order = self._orders.get()
            if order is None:
                return
            batch, context, count = order
            window = LossWindow(progress.terms, progress.run.device)
            progress.window = window
            with context:
                for _ in range(count):
                    yield progress.steps_done, batch
            self._results.put(window.fetch().means())

    def _result(self) -> dict[str, float]:
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def step(
        self, batch, context: AbstractContextManager | None = None, count: int = 1
    ) -> dict[str, float]:
        """Run the body of the program's loop on a batch; return the losses, fetched afterwards.

        The body runs within `context`, in the program's thread, `count` times; the losses are the
        means.
        """
        self._orders.put((batch, context or nullcontext(), count))
        return self._result()
