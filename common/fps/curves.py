"""The training curves of a run as one picture, from its JSON logs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import write_atomically
from common.fps.calc_fps import read_json_log

WIDTH = 9.0  # of the picture, in inches
PANEL_HEIGHT = 2.2
MARGIN = 0.6
DOTS_PER_INCH = 110


class Panel(NamedTuple):
    """A diagram over the steps of the run."""

    title: str
    entries: dict[int, dict]  # log entries by step
    keys: list[str]  # what is drawn of each
    scale: str = "linear"
    from_zero: bool = False


def draw_curves(log_json_paths: Sequence[str | Path], out_png: str | Path) -> None:
    """Draw losses, learning rate, FPS and (where evaluated) AP over the steps of the run.

    The logs of a resumed run are joined; of entries for the same step the last one counts.
    """
    panels = read_panels(log_json_paths)
    height = MARGIN + PANEL_HEIGHT * len(panels)
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel)
    axes[-1].set_xlabel("iteration")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(out_png, picture.getvalue())


def read_panels(log_json_paths: Sequence[str | Path]) -> list[Panel]:
    """Return the panels of what the logs hold."""
    train = {}
    val = {}
    for path in log_json_paths:
        for entry in read_json_log(path):
            if entry.get("mode") == "train":
                train[entry["step"]] = entry
            elif entry.get("mode") == "val":
                val[steps_before_evaluation(entry)] = entry
    panels = [
        Panel("loss", train, loss_terms(train), scale="log"),
        Panel("learning rate", train, ["lr"]),
        Panel("images / s", train, ["fps"], from_zero=True),
    ]
    if val:
        scores = ["bbox_mAP", "bbox_mAP_50", "bbox_mAP_75"]
        panels.append(Panel("COCO AP", val, scores, from_zero=True))
    return panels


def steps_before_evaluation(entry: dict) -> int:
    """Return the steps of the run before an evaluation; older logs name only its epoch."""
    end_of_epoch = entry["epoch"] * entry["iter"]
    return entry.get("steps_done", end_of_epoch)


def loss_terms(train: dict[int, dict]) -> list[str]:
    """Return the names of the losses, the total first: it has the same colour in every run."""
    names = set()
    for entry in train.values():
        names.update(key for key in entry if key.startswith("loss"))
    return sorted(names)


def draw_panel(ax: Axes, panel: Panel) -> None:
    """Draw a curve for each key of a panel."""
    steps = sorted(panel.entries)
    for key in panel.keys:
        values = [panel.entries[step][key] for step in steps]
        ax.plot(steps, values, ".-", markersize=3, label=key)
    ax.set(ylabel=panel.title, yscale=panel.scale)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", ncols=4)
    if panel.from_zero:
        ax.set_ylim(bottom=0)
