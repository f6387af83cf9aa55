"""Replays of golden numbers on a device: what it computes, beside what the originals computed.

A model's `selfcheck.py` has the phases; this has what they share. A deviation is a share of the
largest golden value, so that one number says how far a device is from the original.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from common.npu.device import computes_in_half, has_kernel, synchronize
from common.npu.precision import build_sgd

ROOT = Path(__file__).resolve().parents[2]
WRONG = float("inf")  # the deviation of a result that is another one, not a near one
LEVEL_OF_SCORES = 1e-6  # scores that differ by less may come in either order


class Golden:
    """The golden files of a model, and the rule for the weights that they were computed with."""

    def __init__(self, model: str):
        folder = ROOT / "tests" / "golden"
        self.folder = folder / model
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: no golden files, which the selfcheck replays",
                "run it in a whole checkout of onestage",
            )
        from tests.golden.fill import fill_value  # only a whole checkout has it

        self.fill_value = fill_value
        self.photographs = ROOT / "tests" / "data" / "tiny_coco"
        self._read: dict[str, dict] = {}

    def __call__(self, name: str) -> dict:
        """Return the arrays of `name`.npz."""
        if name not in self._read:
            self._read[name] = dict(np.load(self.folder / f"{name}.npz"))
        return self._read[name]

    def fill(self, model: nn.Module, value_of: Callable[[str, tuple[int, ...]], np.ndarray]):
        """Give a network the weights of the golden files; return it in evaluation mode."""
        state = {}
        for key, tensor in model.state_dict().items():
            state[key] = torch.from_numpy(np.asarray(value_of(key, tuple(tensor.shape))))
        model.load_state_dict(state)
        return model.eval()


class Phase(NamedTuple):
    """A part of a model's work, and how far from the original it may be."""

    name: str
    replay: Callable[[Golden, torch.device], float]  # gives the deviation
    tolerance: float  # in fp32
    tolerance_in_half: float  # where a device convolves in half precision only


class Outcome(NamedTuple):
    """What became of a phase."""

    phase: Phase
    deviation: float
    tolerance: float
    milliseconds: float
    without_kernel: tuple[str, ...]  # operators that the device left to the host
    error: str  # what it ended with, empty for none

    @property
    def passed(self) -> bool:
        return not self.error and self.deviation <= self.tolerance

    def line(self, model: str) -> str:
        """Return the line of the report."""
        verdict = "pass" if self.passed else "FAIL"
        text = f"{verdict}  {model:<14}{self.phase.name:<20}"
        if self.error:
            return f"{text}{self.error}"
        text += f"deviation {self.deviation:8.1e} of {self.tolerance:.0e} allowed"
        text += f"  {self.milliseconds:9.1f} ms"
        if self.without_kernel:
            text += f"  on the host: {', '.join(self.without_kernel)}"
        return text


class _Operators(TorchDispatchMode):
    """Collects the operators for which a device has no kernel."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.without_kernel: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not has_kernel(operator.name(), self.device):
            self.without_kernel.add(operator.name())
        return operator(*args, **(kwargs or {}))


def warm_up(device: torch.device) -> None:
    """Load what the first operator loads, so that it is no phase's time."""
    with _Operators(device):
        torch.zeros(1, device=device).add_(1)
    synchronize(device)


def run_phase(phase: Phase, golden: Golden, device: torch.device) -> Outcome:
    """Replay a phase on a device. Whatever goes wrong becomes the outcome's `error`."""
    tolerance = phase.tolerance_in_half if computes_in_half(device) else phase.tolerance
    operators = _Operators(device)
    deviation = WRONG
    error = ""
    started = time.perf_counter()
    try:
        with operators:
            deviation = phase.replay(golden, device)
        synchronize(device)
    except Exception as failure:  # a check of hardware goes on with the next phase
        first_line = (str(failure).strip() or "no message").splitlines()[0]
        error = f"{type(failure).__name__}: {first_line}"
    return Outcome(
        phase=phase,
        deviation=deviation,
        tolerance=tolerance,
        milliseconds=1000 * (time.perf_counter() - started),
        without_kernel=tuple(sorted(operators.without_kernel)),
        error=error,
    )


def relative(found: Tensor | np.ndarray | float, expected: np.ndarray | float) -> float:
    """Return the largest difference as a share of the largest expected value."""
    found = to_numpy(found).astype(np.float64)
    expected = np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return WRONG
    if expected.size == 0:
        return 0.0
    largest = np.abs(expected).max() or 1.0
    difference = np.abs(found - expected).max() / largest
    return float(difference) if np.isfinite(difference) else WRONG


def relative_of_probe(
    found: Tensor, golden: Mapping[str, np.ndarray], name: str, separator: str = "."
) -> float:
    """Return the deviation of an array of which the golden file keeps some entries."""
    array = to_numpy(found)
    if list(array.shape) != golden[f"{name}{separator}shape"].tolist():
        return WRONG
    entries = array.reshape(-1)[golden[f"{name}{separator}index"]]
    return relative(entries, golden[f"{name}{separator}value"])


def equal_or_wrong(found: Tensor | np.ndarray, expected: np.ndarray) -> float:
    """Return 0 for equal arrays, else `WRONG`."""
    return 0.0 if np.array_equal(to_numpy(found), expected) else WRONG


def to_numpy(value: Tensor | np.ndarray | float) -> np.ndarray:
    """Return a tensor of any device as an array."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)


def deviation_of_detections(
    found: tuple[Tensor, Tensor, Tensor],
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
) -> float:
    """Return the deviation of detections, boxes, scores and 0-based labels, best first.

    Rows of nearly equal scores may come in either order.
    """
    found_boxes, found_scores, found_labels = (to_numpy(part) for part in found)
    if found_labels.shape != labels.shape:
        return WRONG
    group = np.cumsum(np.diff(scores, prepend=scores[:1]) < -LEVEL_OF_SCORES)
    ours = np.lexsort((found_boxes[:, 0], found_labels, group))
    theirs = np.lexsort((boxes[:, 0], labels, group))
    return max(
        equal_or_wrong(found_labels[ours], labels[theirs]),
        relative(found_scores[ours], scores[theirs]),
        relative(found_boxes[ours], boxes[theirs]),
    )


def train(
    model: nn.Module,
    parameters: list,
    device: torch.device,
    rates: Mapping[str, float],
    losses_of_step: Callable[[], Mapping[str, Tensor]],
    steps: int,
    before_update: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
) -> dict[str, list[float]]:
    """Train for some steps on the same batch; return each loss by name, a value a step.

    `before_update` is called with the optimizer between backward pass and update.
    """
    model.train()
    optimizer = build_sgd(parameters, device, **rates)
    history: dict[str, list[float]] = {}
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        losses = losses_of_step()
        losses["loss"].backward()
        before_update(optimizer)
        optimizer.step()
        for name, value in losses.items():
            history.setdefault(name, []).append(value.item())
    return history


def pad_truth(
    boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray], slots: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ground truth as losses take it: boxes (N, M, 4), labels (N, M) and validity (N, M).

    `boxes` has an array (n, 4) an image, `labels` one (n,) of 0-based classes; M is `slots`.
    """
    padded_boxes = torch.zeros(len(boxes), slots, 4)
    padded_labels = torch.zeros(len(boxes), slots, dtype=torch.int64)
    valid = torch.zeros(len(boxes), slots, dtype=torch.bool)
    for i, (boxes_of_image, labels_of_image) in enumerate(zip(boxes, labels, strict=True)):
        count = len(boxes_of_image)
        padded_boxes[i, :count] = torch.from_numpy(boxes_of_image)
        padded_labels[i, :count] = torch.from_numpy(labels_of_image)
        valid[i, :count] = True
    return padded_boxes.to(device), padded_labels.to(device), valid.to(device)
