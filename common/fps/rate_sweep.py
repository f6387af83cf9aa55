"""`--find_lr`: the loss of a network while its learning rate rises, and the rate that follows.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017, section 3.3 (LR range
test), with rates that rise exponentially.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from common.errors import UserError
from common.files import write_figure
from common.npu.overlap import HostCopy
from common.npu.run import Run
from common.npu.trial_step import TrialStep

PICTURE = "find_lr.png"
MOST_STEPS = 200
FEWEST_STEPS = 60  # whatever the length of an epoch
# The first and the last rate, as factors on that of the recipe
LOWEST = 1e-3
HIGHEST = 1e2
SMOOTHING = 1 / 25  # standard deviation of the weights, as part of the steps
DIVERGED = 4.0  # times the lowest smoothed loss: the sweep ends, as fastai's does
# The suggestion is this part of the rate with the lowest smoothed loss: one order of magnitude
# below it, as in Howard and Gugger, Deep Learning for Coders, 2020, chapter 5.
BELOW_LOWEST = 0.1
LEAST_FALL = 0.05  # of the smoothed loss, relative to that of the first step, for a suggestion
ROWS = 12  # of the table
FIGURE_SIZE = (8, 5)  # inches
DOTS_PER_INCH = 120


class Sweep(NamedTuple):
    """What was measured; the arrays (S,) are float64."""

    rates: np.ndarray  # of the optimizer
    losses: np.ndarray  # the mean of all ranks
    smoothed: np.ndarray

    @property
    def lowest(self) -> int:
        """The step with the lowest smoothed loss."""
        return int(self.smoothed.argmin())

    @property
    def suggestion(self) -> float | None:
        """The rate to train with, None where the loss has not fallen."""
        if self.smoothed[self.lowest] > (1 - LEAST_FALL) * self.smoothed[0]:
            return None
        return float(self.rates[self.lowest]) * BELOW_LOWEST

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest over the logarithm of the rate."""
        if self.lowest == 0:
            return float(self.rates[0])
        slopes = np.gradient(
            self.smoothed[: self.lowest + 1], np.log(self.rates[: self.lowest + 1])
        )
        return float(self.rates[slopes.argmin()])


def sweep_rates(
    run: Run, step: TrialStep, build_loader: Callable, train_set: Any, steps_per_epoch: int
) -> int | None:
    """Train with a rising rate, print the losses and a suggestion, and draw them.

    The batches are the first ones of the run. Nothing is saved but the picture, in the output
    folder, so that the step may change its network. All ranks must call it. Return the exit status
    of a process that was asked to stop, else None. Raise UserError where the first loss is not
    finite.
    """
    recipe = step.recipe
    usual_rate = recipe.base_lr(run.ranks.world_size, recipe.batch_size)
    steps = min(MOST_STEPS, max(FEWEST_STEPS, steps_per_epoch))
    if run.settings.max_iters:
        steps = min(MOST_STEPS, run.settings.max_iters)
    rates = rising_rates(usual_rate, steps)
    run.log.info(
        f"--find_lr: {steps} steps with rates from {rates[0]:.3g} to {rates[-1]:.3g}; nothing is "
        "saved but their picture"
    )
    loader = build_loader(
        recipe,
        train_set,
        training=True,
        ranks=run.ranks,
        workers=run.workers,
        seed=run.seed,
        end=steps,
        pin_memory=run.pin_memory,
    )
    losses = _losses(run, step, loader, rates)
    if losses is None:
        return run.stop.status
    if not losses:
        raise UserError(
            "--find_lr: the loss of the first step is not finite",
            "see --check_data, or start from trained weights",
        )
    sweep = make_sweep(rates, losses)
    if run.ranks.main:
        run.log.info(report(sweep, run, recipe))
        path = run.output_dir / PICTURE
        draw(sweep, usual_rate, f"{recipe.name}: --find_lr", path)
        run.log.info(f"written: {path}")
    return None


def rising_rates(usual_rate: float, steps: int) -> np.ndarray:
    """Return the rates (S,) of a sweep around the rate of a recipe."""
    return np.geomspace(LOWEST * usual_rate, HIGHEST * usual_rate, steps)


def make_sweep(rates: np.ndarray, losses: list[float]) -> Sweep:
    """Return the sweep of these losses; the rates (S,) are those of all steps that were planned."""
    count = len(losses)
    return Sweep(rates[:count], np.array(losses), smooth(np.array(losses), SMOOTHING * len(rates)))


def smooth(losses: np.ndarray, deviation: float) -> np.ndarray:
    """Return means (S,) of each loss and its neighbours, weighted by a Gaussian over the steps."""
    number = np.arange(len(losses))
    distance = (number[:, None] - number) / deviation
    weights = np.exp(-(distance**2) / 2)
    return weights @ losses / weights.sum(axis=1)


def _losses(run: Run, step: TrialStep, loader: Any, rates: np.ndarray) -> list[float] | None:
    """Return the losses of the steps up to the one at which training diverges.

    None where a signal asks to stop.
    """
    losses = []
    on_its_way = None
    for rate, batch in zip(rates, loader, strict=True):
        if run.stop.agreed(run.ranks):
            return None
        loss = HostCopy(step.do(batch.to(run.device), float(rate)))
        # An accelerator has this step to do while the loss of the one before is looked at.
        if on_its_way is not None and not _goes_on(run, losses, on_its_way, len(rates)):
            return losses
        on_its_way = loss
    _goes_on(run, losses, on_its_way, len(rates))
    return losses


def _goes_on(run: Run, losses: list[float], copy: HostCopy, num_steps: int) -> bool:
    """Add a step's loss, the mean of all ranks, and return whether the sweep goes on.

    It ends before a loss that is not finite, and after one that is much higher than the lowest.
    """
    of_ranks = run.ranks.all_gather_objects(copy.wait().item())
    loss = sum(of_ranks) / len(of_ranks)
    if not math.isfinite(loss):
        return False
    losses.append(loss)
    smoothed = smooth(np.array(losses), SMOOTHING * num_steps)
    return smoothed[-1] <= DIVERGED * smoothed.min()


def report(sweep: Sweep, run: Run, recipe: Any) -> str:
    """Return, on several lines, a table of the sweep and the suggestion as a flag."""
    lines = [f"{'learning rate':>14}  {'loss':>10}  smoothed"]
    count = len(sweep.rates)
    for i in np.unique(np.linspace(0, count - 1, min(ROWS, count)).round().astype(int)):
        mark = "  lowest" if i == sweep.lowest else ""
        lines.append(
            f"{sweep.rates[i]:14.3g}  {sweep.losses[i]:10.4g}  {sweep.smoothed[i]:8.4g}{mark}"
        )
    lowest = sweep.rates[sweep.lowest]
    world_size = run.ranks.world_size
    usual_rate = recipe.base_lr(world_size, recipe.batch_size)
    suggestion = sweep.suggestion
    if suggestion is None:
        lines.append(
            f"no suggestion: the loss has hardly fallen; the recipe's learning rate is "
            f"{usual_rate:.3g}; start from trained weights, or give more steps (--max_iters)"
        )
        return "\n".join(lines)
    lines.append(
        f"suggestion: {recipe.lr_flags(suggestion, world_size, recipe.batch_size)}, a learning "
        f"rate of {suggestion:.2g} with this global batch of {world_size * recipe.batch_size}: a "
        f"tenth of the {lowest:.2g} of the lowest smoothed loss; the loss falls fastest at "
        f"{sweep.steepest:.2g}; the recipe has --lr={recipe.lr:g}, a learning rate of "
        f"{usual_rate:.2g}"
    )
    return "\n".join(lines)


def draw(sweep: Sweep, usual_rate: float, title: str, path: Path) -> None:
    """Draw the losses over the rates, with the suggestion and the rate of the recipe."""
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot(sweep.rates, sweep.losses, color="C0", alpha=0.35, linewidth=1, label="loss")
    axes.plot(sweep.rates, sweep.smoothed, color="C0", linewidth=2, label="loss, smoothed")
    axes.axvline(usual_rate, color="C7", linestyle="--", label=f"recipe: {usual_rate:.2g}")
    if sweep.suggestion is not None:
        axes.axvline(sweep.suggestion, color="C3", label=f"suggestion: {sweep.suggestion:.2g}")
    lowest = sweep.smoothed.min()
    start = sweep.smoothed[0]
    axes.set_ylim(0.9 * min(lowest, sweep.losses.min()), 1.5 * max(start, lowest))
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    write_figure(path, figure, DOTS_PER_INCH)
