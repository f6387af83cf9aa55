"""How many boxes of a training file are trained on, and why the others are not."""

import numpy as np

from common.coco.index import CocoIndex, Severity
from common.errors import UserError


def trained_boxes_line(index: CocoIndex, untrained: dict[str, np.ndarray]) -> str:
    """Return a line that says how many boxes of a file are trained on, and why not all.

    `index` has the usable annotations, `untrained` says by reason which of them (A,) the recipe
    leaves out. A box counts for the first of its reasons. Raise UserError where none is left.
    """
    reasons = {}
    for rule, findings in index.broken_rules().items():
        if rule.severity is Severity.SKIP:
            reasons[rule.text] = reasons.get(rule.text, 0) + findings.count  # of several files
    num_boxes = len(index.table) + sum(reasons.values())
    is_left = np.ones(len(index.table), dtype=bool)
    for reason, is_untrained in untrained.items():
        count = np.count_nonzero(is_left & is_untrained)
        if count:
            reasons[reason] = count
        is_left &= ~is_untrained
    num_trained = np.count_nonzero(is_left)
    line = f"{num_trained} of {num_boxes} boxes are trained on"
    if reasons:
        counts = [f"{count} {reason}" for reason, count in reasons.items()]
        line += f"; left out: {', '.join(counts)}"
    if num_trained == 0:
        raise UserError(f"{index.annotation_file}: {line}; there is nothing to train on")
    return line
