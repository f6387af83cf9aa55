"""Which model and preset sees the boxes of a data set: a table of all of them side by side."""

from typing import NamedTuple

import numpy as np

from common.coco.counts import count_lines, training_boxes
from common.coco.coverage import (
    SAMPLE_SEED,
    Coverage,
    Presets,
    column_masks,
    cover,
    different_presets,
    percent,
    sample_boxes,
    share_cells,
    text_table,
)
from common.coco.index import read_index
from common.coco.layout import Files
from common.errors import UserError

# Columns, in percent: the root of a box's area over that of its image. At an input of 300 x 300
# pixels a box of 5 % has a side of 15 pixels.
RELATIVE_SIDES = (0, 2, 5, 10, 20, 40)
# Of presets whose shares differ by less, the first is named: the models begin with the cheapest.
NEARLY_AS_MUCH = 0.02


class Candidate(NamedTuple):
    """A preset of a model, and which boxes it sees."""

    model: str
    kind: str  # of what a box is learned from: "anchors" or "points"
    coverage: Coverage

    @property
    def label(self) -> str:
        return f"{self.model} --recipe {self.coverage.preset} ({self.coverage.input_size})"


def compare_presets(files: Files, models: dict[str, Presets]) -> list[str]:
    """Return the lines on which boxes of a training set the presets of the models see.

    The boxes are those that are usable and no crowds. Raise UserError for errors in the annotation
    file, and where it has no box.
    """
    index = read_index(files.annotation_file, files.image_dir)
    boxes = training_boxes(index, {"iscrowd": index.table.crowd}, index.class_names)
    if len(boxes.labels) == 0:
        raise UserError(f"{files.annotation_file}: no box to compare the detectors on")
    sample, image_sizes = sample_boxes(boxes)
    candidates = []
    for model, presets in models.items():
        for name, recipe in different_presets(presets).items():
            coverage = cover(sample, image_sizes, name, recipe, presets.matching)
            candidates.append(Candidate(model, presets.matching.kind, coverage))

    title = (
        "boxes and the share of them that is seen, by their side: the root of a box's area over "
        "that of its image"
    )
    if len(sample) < len(boxes.labels):
        title += f"; {len(sample)} boxes, drawn with seed {SAMPLE_SEED}"
    lines = [f"training set: {files}"]
    lines += [f"  {line}" for line in count_lines(boxes)]
    lines += ["", title]
    lines += _table(candidates, _relative_sides(sample, image_sizes))
    lines += ["", *_meanings(models), _conclusion(candidates)]
    return lines


def _relative_sides(boxes_xyxy: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Return the side of each box (S, 4) in percent of that of its image (S, 2)."""
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    return 100 * np.sqrt(areas / image_sizes.prod(axis=1))


def _table(candidates: list[Candidate], relative_sides: np.ndarray) -> list[str]:
    columns = column_masks(relative_sides, RELATIVE_SIDES)
    titles = []
    for start, end in zip(RELATIVE_SIDES, (*RELATIVE_SIDES[1:], None), strict=True):
        titles.append(f">{start} %" if end is None else f"{start}-{end} %")
    labels = ["side", "boxes"]
    counts = [str(np.count_nonzero(column)) for column in columns]
    rows = [[*titles, "all"], [*counts, str(len(relative_sides))]]
    for candidate in candidates:
        labels.append(candidate.label)
        rows.append(share_cells(candidate.coverage.seen, columns))
    return text_table(labels, rows)


def _meanings(models: dict[str, Presets]) -> list[str]:
    """Return a line for each meaning that "seen" has, with the models that have it."""
    models_of_meaning = {}
    for model, presets in models.items():
        models_of_meaning.setdefault(presets.matching.seen, []).append(model)
    lines = []
    for meaning, names in models_of_meaning.items():
        lines.append(f"seen by {', '.join(names)}: {meaning}")
    if len(lines) > 1:
        lines.append("the conditions differ: only shares of detectors with the same one compare")
    return lines


def _conclusion(candidates: list[Candidate]) -> str:
    """Return one sentence: which preset fits best, of each kind of detector.

    A point in a box is less than an anchor that fits it: shares of different kinds do not compare.
    """
    candidates_of_kind = {}
    for candidate in candidates:
        candidates_of_kind.setdefault(candidate.kind, []).append(candidate)
    clauses = []
    for kind, of_kind in candidates_of_kind.items():
        best = _first_of_the_best(of_kind)
        clauses.append(
            f"of the detectors with {kind} {best.label}, which sees "
            f"{percent(best.coverage.share)} of the boxes"
        )
    return f"fits best: {'; '.join(clauses)}."


def _first_of_the_best(candidates: list[Candidate]) -> Candidate:
    """Return the first of those that see nearly as much as the best: later ones cost more."""
    most = max(candidate.coverage.share for candidate in candidates)
    return next(one for one in candidates if one.coverage.share >= most - NEARLY_AS_MUCH)
