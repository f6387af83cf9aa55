"""Which images of a training set a run sees, and how often in an epoch."""

import math

import numpy as np

from common.coco.index import CocoIndex
from common.errors import UserError


def subset_size(asked: str, available: int) -> int:
    """Return how many of the `available` images `--subset` asks for: a number, or a share below 1.

    Raise UserError for anything else.
    """
    remedy = f"give a number of images from 1 to {available}, or a share such as 0.1"
    try:
        number = float(asked)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--subset {asked}: is no number", remedy)
    if 0 < number < 1:
        return math.ceil(number * available)
    if number == 1 and not asked.isdecimal():
        raise UserError(f"--subset {asked}: is it one image or all of them?", remedy)
    if number != int(number) or not 1 <= number <= available:
        raise UserError(f"--subset {asked}: the training set has {available} images", remedy)
    return int(number)


def draw_subset(size: int, available: int, seed: int) -> np.ndarray:
    """Return the positions (size,) of the images of a subset, in their order in the whole set.

    A smaller subset of the same seed is part of a larger one.
    """
    return np.sort(np.random.default_rng(seed).permutation(available)[:size])


def repeat_factors(records: CocoIndex, threshold: float) -> np.ndarray | None:
    """Return how often each image (I,) float64 is to come in an epoch, at least once.

    With a threshold of 0 nothing is balanced: return None.

    A class that a share f of the images has, below `threshold`, gets the factor sqrt(threshold /
    f). The factor of an image is the largest of its classes. Crowds do not count. Source: Gupta et
    al., LVIS, CVPR 2019, the appendix on repeat factor sampling. Raise UserError for a threshold
    that is no share.
    """
    if threshold == 0:
        return None
    if threshold > 1:
        raise UserError(
            f"--balance {threshold:g}: is a share of the images, at most 1",
            "give a share such as 0.1",
        )
    factors = np.ones(len(records))
    images = np.repeat(np.arange(len(records)), np.diff(records.offsets))
    is_object = ~records.table.crowd
    # Each class of an image once.
    pairs = np.stack([images[is_object], records.table.label[is_object]], axis=1)
    images, labels = np.unique(pairs, axis=0).T
    images_of_class = np.bincount(labels, minlength=len(records.class_names))
    shares = np.maximum(images_of_class, 1) / len(records)
    factor_of_class = np.maximum(1, np.sqrt(threshold / shares))
    np.maximum.at(factors, images, factor_of_class[labels])
    return factors


def balance_line(records: CocoIndex, threshold: float) -> str:
    """Return a line that says what `--balance` does with a training set."""
    factors = repeat_factors(records, threshold)
    more = np.count_nonzero(factors > 1)
    return (
        f"--balance {threshold:g}: {more} of {len(records)} images come more than once in a pass, "
        f"up to {factors.max():.1f} times; a pass has {factors.sum():.0f} images"
    )


class EpochRecords:
    """The records that the positions of an epoch stand for.

    `groups` are those of the records (R,) that batches are not to mix, in ascending order. An epoch
    is `repeat` passes over the records: position p stands for record p modulo R. With `factors`
    (R,) it has each record `repeat` times its factor on average, drawn anew for each epoch, of a
    number that is the same in all: then the positions are in the order of the groups.
    """

    def __init__(
        self,
        groups: list[np.ndarray],
        repeat: int = 1,
        factors: np.ndarray | None = None,
    ):
        self._groups = groups
        self._num_records = sum(len(group) for group in groups)
        self._factors = factors
        self.groups = []  # the positions of each group
        if factors is None:
            for group in groups:
                passes = [group + number * self._num_records for number in range(repeat)]
                self.groups.append(np.concatenate(passes))
            return
        start = 0
        for group in groups:
            length = max(1, round(repeat * factors[group].sum()))
            self.groups.append(np.arange(start, start + length))
            start += length

    def __len__(self) -> int:
        return sum(len(positions) for positions in self.groups)

    def of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Return the record of each position of an epoch."""
        if self._factors is None:
            return np.arange(len(self)) % self._num_records
        rng = np.random.default_rng((seed, epoch))
        records = []
        for group, positions in zip(self._groups, self.groups, strict=True):
            counts = _draw_counts(self._factors[group], len(positions), rng)
            records.append(np.repeat(group, counts))
        return np.concatenate(records)


def _draw_counts(factors: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Round factors (n,), scaled to the sum `total`, up or down at random to counts of that sum.

    Systematic sampling: the scaled factors lie in a row in random order, and each counts the whole
    numbers on it after a shift of the row that is drawn from 0 to 1.
    """
    order = rng.permutation(len(factors))
    ends = np.cumsum(factors[order]) * (total / factors.sum())
    ends[-1] = total
    numbers = np.floor(ends + rng.random()).astype(np.int64)
    counts = np.empty(len(factors), np.int64)
    counts[order] = np.diff(numbers, prepend=0)
    return counts
