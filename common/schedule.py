"""A schedule that follows the length of its run: for data sets of any size."""

DECAYS = (2 / 3, 8 / 9)  # of the run, as in Detectron's schedules: 60 and 80 of 90 thousand steps
WARMUP_SHARE = 10  # a warm-up takes at most one step of this many
EVALUATIONS = 10  # of a run whose interval between evaluations is AUTOMATIC
AUTOMATIC = -1


def decays_done(fractions: tuple[float, ...], iteration: int, total_steps: int) -> int:
    """Return how many decays come before an iteration, counted from 0.

    `fractions` of the `total_steps` are done when the decays take effect, each rounded to a step.
    """
    decays = 0
    for fraction in fractions:
        if iteration >= round(fraction * total_steps):
            decays += 1
    return decays


def limited_warmup(warmup_steps: int, total_steps: int) -> int:
    """Return the steps of a warm-up, at most a tenth of the run: short runs have to learn too."""
    return min(warmup_steps, total_steps // WARMUP_SHARE)


def evaluation_interval(eval_interval: int, evaluation: tuple[int, ...], epochs: float) -> int:
    """Return the epochs from one evaluation to the next, 0 where there is no such interval.

    AUTOMATIC gives a run about ten evaluations, unless `evaluation` names the epochs.
    """
    if eval_interval != AUTOMATIC:
        return eval_interval
    if evaluation:
        return 0
    return max(1, round(epochs / EVALUATIONS))
