"""The training curves of a run as one picture, from its JSON logs."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from common.files import write_figure
from common.fps.calc_fps import read_json_log

WIDTH = 10.0  # of the picture, in inches
PANEL_HEIGHT = 2.2
MARGIN = 0.8
DOTS_PER_INCH = 110
# Up to so many points a curve has a dot for each, which is all there is to see of a single one.
MOST_DOTS = 60
ROUND_STEPS = (1, 2, 5, 10)  # between two ticks, times a power of ten
SVG_SIZE = (4.6, 2.8)  # inches of a panel on a page
# Colours that a page replaces by its own, which are others on a dark screen.
TEXT_COLOUR = "#010203"
SVG_STYLE = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "onestage",  # the same picture gives the same file
    "text.color": TEXT_COLOUR,
    "axes.labelcolor": TEXT_COLOUR,
    "axes.edgecolor": TEXT_COLOUR,
    "xtick.color": TEXT_COLOUR,
    "ytick.color": TEXT_COLOUR,
    "grid.color": TEXT_COLOUR,
    "legend.frameon": False,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
UNUSED_ID = re.compile(r' id="[\w.]+_\d+"')  # of matplotlib's groups, the same in every picture


class Panel(NamedTuple):
    """A diagram over the steps of the run."""

    title: str
    entries: dict[int, dict]  # log entries by step
    keys: list[str]  # what is drawn of each
    scale: str = "linear"
    from_zero: bool = False
    dots: bool = False  # a dot for each point, however many there are


def draw_curves(log_json_paths: Sequence[str | Path], out_png: str | Path) -> None:
    """Draw losses, learning rate, FPS and (where evaluated) AP over the steps of the run.

    The logs of a resumed run are joined; of entries for the same step the last one counts. Epochs
    are at the upper edge, where the run has begun a second one or was evaluated.
    """
    panels = read_panels(log_json_paths)
    height = MARGIN + PANEL_HEIGHT * len(panels)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel)
    axes[-1].set_xlabel("iteration")
    axes[-1].set_xlim(left=0)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=10, steps=ROUND_STEPS, integer=True))
    steps_per_epoch = find_steps_per_epoch(panels)
    if steps_per_epoch is not None:
        draw_epochs(axes[0], steps_per_epoch)
    write_figure(out_png, figure, DOTS_PER_INCH)


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
        panels.append(Panel("COCO AP", val, scores, from_zero=True, dots=True))
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


def find_steps_per_epoch(panels: list[Panel]) -> int | None:
    """Return the steps of an epoch, None where the logs do not tell: within the first epoch."""
    for panel in panels:
        for step, entry in panel.entries.items():
            if entry["mode"] == "val":  # its "iter" is the length of the epoch
                return entry["iter"]
            if entry["epoch"] > 1:
                return (step - entry["iter"]) // (entry["epoch"] - 1)
    return None


def draw_panel(ax: Axes, panel: Panel) -> None:
    """Draw a curve for each key of a panel, with the legend beside the axes: it hides no point."""
    steps = sorted(panel.entries)
    marker = ""
    if panel.dots or len(steps) <= MOST_DOTS:
        marker = "o"
    largest = 0.0
    for key in panel.keys:
        values = [panel.entries[step][key] for step in steps]
        largest = max([largest, *values])
        ax.plot(steps, values, marker=marker, markersize=4, label=key)
    ax.set(ylabel=panel.title, yscale=panel.scale)
    if panel.scale == "log":
        # Also within a decade, which a short run does not leave.
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    if panel.from_zero:
        ax.set_ylim(0, 1.1 * largest if largest > 0 else 1)


def draw_epochs(ax: Axes, steps_per_epoch: int) -> None:
    """Draw an axis of epochs at the upper edge."""
    epochs = ax.secondary_xaxis(
        "top",
        functions=(lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch),
    )
    epochs.set_xlabel("epoch")
    epochs.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=ROUND_STEPS))


def panel_svg(panel: Panel) -> str:
    """Return a panel as an SVG element for a page, in the page's colour of text."""
    import matplotlib

    picture = io.StringIO()
    with matplotlib.rc_context(SVG_STYLE):
        figure = Figure(figsize=SVG_SIZE, layout="constrained")
        axes = figure.subplots()
        draw_panel(axes, panel)
        axes.set_xlabel("iteration")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS, integer=True))
        axes.get_legend().remove()
        if len(panel.keys) > 1:  # above the axes, which are narrow; the title names a single one
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=3,
                borderaxespad=0.2,
                fontsize="small",
                columnspacing=1,
                handlelength=1.5,
            )
        for line in axes.lines:
            line.set_markersize(2.5)
        figure.savefig(picture, format="svg", transparent=True, metadata=NO_METADATA)
    element = picture.getvalue()
    element = element[element.index("<svg") :]
    return UNUSED_ID.sub("", element).replace(TEXT_COLOUR, "currentColor")
