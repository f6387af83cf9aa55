"""How many boxes of an annotation file are used, and why the others are not."""

from typing import NamedTuple

import numpy as np

from common.coco.index import CocoIndex, Severity
from common.errors import UserError


class BoxCount(NamedTuple):
    """How many boxes of a file are used, of how many, and how many are left out by reason."""

    num_used: int
    num_boxes: int
    left_out: dict[str, int]

    def line(self, use: str) -> str:
        """Return the sentence that says it; `use` is what is done with the boxes."""
        line = f"{self.num_used} of {self.num_boxes} boxes {use}"
        if self.left_out:
            counts = [f"{count} {reason}" for reason, count in self.left_out.items()]
            line += f"; left out: {', '.join(counts)}"
        return line


def count_boxes(index: CocoIndex, unused: dict[str, np.ndarray]) -> BoxCount:
    """Count the boxes of a file that are used, and by reason those that are not.

    `index` has the usable annotations, `unused` says by reason which of them (A,) are left out. A
    box counts for the first of its reasons; what the index itself has skipped comes first.
    """
    left_out = {}
    for rule, findings in index.broken_rules().items():
        if rule.severity is Severity.SKIP:
            left_out[rule.text] = left_out.get(rule.text, 0) + findings.count  # of several files
    num_boxes = len(index.table) + sum(left_out.values())
    is_used = np.ones(len(index.table), dtype=bool)
    for reason, is_unused in unused.items():
        count = np.count_nonzero(is_used & is_unused)
        if count:
            left_out[reason] = count
        is_used &= ~is_unused
    return BoxCount(np.count_nonzero(is_used), num_boxes, left_out)


def trained_boxes_line(index: CocoIndex, untrained: dict[str, np.ndarray]) -> str:
    """Return a line that says how many boxes of a file are trained on, and why not all.

    The parameters are those of `count_boxes`. Raise UserError where no box is left.
    """
    count = count_boxes(index, untrained)
    line = count.line("are trained on")
    if count.num_used == 0:
        raise UserError(f"{index.annotation_file}: {line}; there is nothing to train on")
    return line
