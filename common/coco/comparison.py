"""Detectors side by side on one val set: how good and how fast they are, and what they see."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from common.coco.coverage import text_table
from common.coco.draw import draw_panel
from common.coco.evaluation import STATS, Evaluation, gather_result_rows, shown_score
from common.coco.images import ImageReader
from common.coco.index import CocoIndex
from common.coco.metrics import curves_of_classes
from common.coco.page import digits, embedded, metric_text, positions, program_lines, render
from common.coco.report import spread_over, to_xyxy
from common.files import encoded, write_atomically
from common.fps.benchmark import PHASES, Speed
from common.npu.distributed import Ranks

COMPARISON_FILE = "compare.html"
IMAGES_SHOWN = 8
IMAGES_AHEAD = 16  # that are read at once
BEST_MARK = "*"  # behind the best of several figures
SECTIONS = (
    ("summary", "Summary"),
    ("classes", "Classes"),
    ("pr_curves", "Precision-recall"),
    ("images", "Images"),
    ("runs", "Runs"),
)


@dataclass(frozen=True, eq=False)
class Measured:
    """A detector with what was measured of it on the val set."""

    name: str  # a short one
    program: dict[str, object]  # of `describe_program`, and the checkpoint
    evaluation: Evaluation
    result_rows: np.ndarray  # (n, 7)
    speed: Speed  # at batch size 1
    num_parameters: int
    flops: int  # of an image of input_size
    input_size: tuple[int, int]  # height, width of the network input in pixels

    @property
    def min_score(self) -> float:
        """The score from which detections are drawn."""
        return shown_score(self.evaluation.best.score)


@dataclass(frozen=True)
class Row:
    """A figure of all runs."""

    label: str
    texts: list[str]
    best: int | None = None  # the position of the best run; None where none is better


def detect_on(
    detector,
    program: ModuleType,
    records: CocoIndex,
    turns_if_both_fit: bool,
    threads: int,
    advance: Callable[[], None],
) -> np.ndarray:
    """Return the result rows (n, 7) of a detector on all images of a set, one after the other.

    `program` is the `evaluate` module of its model, whose result rows these are; `records` have the
    classes in the detector's order; `turns_if_both_fit` as in ImageReader; `advance` is called
    after each image. Raise UserError for an unreadable image.
    """
    reader = ImageReader(records, turns_if_both_fit)
    result_rows = []
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(records), IMAGES_AHEAD):
            positions = range(first, min(first + IMAGES_AHEAD, len(records)))
            for i, image in zip(positions, pool.map(reader.read, positions), strict=True):
                outputs = detector.run_network(detector.prepare([image]))
                result_rows += program.rows_of_batch(
                    program.start_detect(outputs, detector.recipe),
                    torch.tensor([image.shape[:2]]),
                    torch.tensor([records.image_ids[i]]),
                    detector.recipe,
                    records,
                )
                advance()
    return gather_result_rows(result_rows, Ranks())


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the paths without the folders that all have in common at the beginning and the end.

    Equal paths are numbered.
    """
    parts = [list(Path(path).parts) for path in paths]
    while min(map(len, parts)) > 1 and len({of_path[0] for of_path in parts}) == 1:
        parts = [of_path[1:] for of_path in parts]
    while min(map(len, parts)) > 1 and len({of_path[-1] for of_path in parts}) == 1:
        parts = [of_path[:-1] for of_path in parts]
    names = ["/".join(of_path) for of_path in parts]
    if len(set(names)) == len(names):
        return names
    return [f"{number}: {name}" for number, name in enumerate(names, 1)]


def summary_rows(runs: Sequence[Measured]) -> list[Row]:
    """Return the figures of the runs: accuracy, speed and size."""
    rows = [
        Row("model", [run.program["model"] for run in runs]),
        Row("network", [run.program["recipe"]["name"] for run in runs]),
    ]
    for name in STATS:
        rows.append(metric_row(name, [run.evaluation.stats[name] for run in runs]))
    points = [run.evaluation.best for run in runs]
    rows.append(metric_row("best F1", [point.f1 for point in points]))
    rows.append(Row("from score", [metric_text(point.score) for point in points]))
    times = [1000 / run.speed.images_per_second for run in runs]
    rows.append(Row("ms an image", [digits(time, 1) for time in times], best_of(times, min)))
    for phase in PHASES:
        medians = [digits(run.speed.percentiles[phase][0], 1) for run in runs]
        rows.append(Row(f"of it {phase}", medians))
    parameters = [run.num_parameters for run in runs]
    flops = [run.flops for run in runs]
    rows += [
        Row("M parameters", [digits(value / 1e6, 1) for value in parameters]),
        Row("GFLOPs an image", [digits(value / 1e9, 1) for value in flops]),
        Row("input, pixels", [f"{run.input_size[1]} x {run.input_size[0]}" for run in runs]),
    ]
    return rows


def metric_row(label: str, values: list[float]) -> Row:
    """Return the row of a metric, of which the highest is the best unless all look the same."""
    texts = [metric_text(value) for value in values]
    best = best_of(values, max) if len(set(texts)) > 1 else None
    return Row(label, texts, best)


def best_of(values: list[float], choose: Callable) -> int | None:
    """Return the position of the best value, None where all are equal."""
    if len(set(values)) == 1:
        return None
    return values.index(choose(values))


def class_rows(runs: Sequence[Measured]) -> list[Row]:
    """Return the AP of each class."""
    rows = []
    for of_class in zip(*(run.evaluation.classes for run in runs), strict=True):
        rows.append(metric_row(of_class[0].name, [metrics.ap for metrics in of_class]))
    return rows


def table_lines(runs: Sequence[Measured]) -> list[str]:
    """Return the comparison as a table for a terminal: a column for each run.

    The best of a line has a mark.
    """
    rows = [
        Row("", [run.name for run in runs]),
        *summary_rows(runs),
        Row("AP of each class", [""] * len(runs)),
        *class_rows(runs),
    ]
    cells = []
    for row in rows:
        marked = [f"{text} " for text in row.texts]
        if row.best is not None:
            marked[row.best] = row.texts[row.best] + BEST_MARK
        cells.append(marked)
    lines = text_table([row.label for row in rows], cells)
    return [line.rstrip() for line in lines]


def write_comparison(
    folder: Path, runs: Sequence[Measured], records: CocoIndex, turns_if_both_fit: bool
) -> Path:
    """Write `compare.html` and return its path. Raise UserError where it cannot be written."""
    programs = []
    for run in runs:
        programs.append({"name": run.name, **program_lines(run.program)})
    curves = pr_choices(runs)
    page = render(
        "compare.html",
        title=" / ".join(run.name for run in runs),
        subtitle=f"{len(records)} images of {records.annotation_file}",
        sections=SECTIONS,
        runs=programs,
        summary=summary_rows(runs),
        classes=class_table(runs),
        pr_curves=curves,
        curve_of_class=positions(curves),
        images=image_rows(runs, records, turns_if_both_fit),
    )
    path = folder / COMPARISON_FILE
    write_atomically(path, encoded(page))
    return path


def class_table(runs: Sequence[Measured]) -> list[dict]:
    """Return the AP of each class as numbers, the boxes, and how far the runs are apart."""
    rows = []
    for of_class in zip(*(run.evaluation.classes for run in runs), strict=True):
        values = [metrics.ap for metrics in of_class]
        rows.append(
            {
                "name": of_class[0].name,
                "boxes": of_class[0].num_boxes,
                "values": values,
                "best": best_of(values, max),
                "spread": max(values) - min(values),
            }
        )
    return rows


def pr_choices(runs: Sequence[Measured]) -> list[dict]:
    """Return the precision-recall curves at IoU 0.50 that can be chosen: a line for each run."""
    curves = [curves_of_classes(run.evaluation) for run in runs]
    choices = []
    for name in curves[0]:
        lines = [of_run[name]["AP50"] for of_run in curves]
        choices.append({"name": name, "lines": lines, "best": None, "text": ""})
    return choices


def image_rows(runs: Sequence[Measured], records: CocoIndex, turns_if_both_fit: bool) -> list[dict]:
    """Return some images with their ground truth and the detections of each run, as addresses.

    They are spread over the images that have ground truth.
    """
    with_boxes = np.flatnonzero(np.diff(records.offsets))
    label_of = {category_id: label for label, category_id in enumerate(records.category_ids)}
    reader = ImageReader(records, turns_if_both_fit)
    rows = []
    for position in spread_over(len(with_boxes), IMAGES_SHOWN):
        i = with_boxes[position]
        image = reader.read(i)
        ground_truth = records.annotations(i)
        boxes = to_xyxy(ground_truth.box_xywh)
        panel = draw_panel(image, boxes, ground_truth.label, records.class_names)
        panels = [{"title": "ground truth", "picture": embedded(panel)}]
        for run in runs:
            is_shown = run.result_rows[:, 0] == records.image_ids[i]
            is_shown &= run.result_rows[:, 5] >= run.min_score
            shown = run.result_rows[is_shown]
            labels = [label_of[category_id] for category_id in shown[:, 6]]
            shown_boxes = to_xyxy(shown[:, 1:5])
            panel = draw_panel(image, shown_boxes, labels, records.class_names, shown[:, 5])
            title = f"{run.name}, score from {run.min_score:.2f}"
            panels.append({"title": title, "picture": embedded(panel)})
        rows.append({"file": Path(records.path(i)).name, "panels": panels})
    return rows
