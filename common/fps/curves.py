"""The training curves of a run as one picture, from its JSON logs."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from common.files import write_atomically
from common.fps.calc_fps import read_json_log


def draw_curves(log_json_paths: Sequence[str | Path], out_png: str | Path) -> None:
    """Draw losses, learning rate, FPS and (where evaluated) mAP over the steps of the run.

    Several logs (a resumed run) are joined; of lines for the same step the last one counts.
    """
    lines = [line for path in log_json_paths for line in read_json_log(path)]
    train = {line["step"]: line for line in lines if line.get("mode") == "train"}
    val = {line["epoch"] * line["iter"]: line for line in lines if line.get("mode") == "val"}
    # The total first, so that every run draws it in the same colour.
    terms = sorted({key for line in train.values() for key in line if key.startswith("loss")})
    panels = [
        ("loss", train, terms),
        ("learning rate", train, ["lr"]),
        ("images / s", train, ["fps"]),
        ("COCO AP", val, ["bbox_mAP", "bbox_mAP_50", "bbox_mAP_75"]),
    ]
    panels = panels if val else panels[:-1]
    figure = Figure(figsize=(9, 0.6 + 2.2 * len(panels)), dpi=110, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for ax, (title, points, keys) in zip(axes, panels, strict=True):
        steps = sorted(points)
        for key in keys:
            ax.plot(steps, [points[step][key] for step in steps], ".-", markersize=3, label=key)
        ax.set(ylabel=title, yscale="log" if title == "loss" else "linear")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", ncols=4)
    for ax in axes[2:]:  # rates and scores are read against zero
        ax.set_ylim(bottom=0)
    axes[-1].set_xlabel("iteration")
    figure.savefig(picture := io.BytesIO(), format="png")
    write_atomically(out_png, picture.getvalue())
