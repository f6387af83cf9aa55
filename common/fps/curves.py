"""The training curves of a run as one picture, from its JSON logs."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.fps.calc_fps import read_json_log
from common.npu.errors import UserError
from common.npu.files import write_atomically

LOG_SCALE_SPAN = 20  # largest / smallest loss from which a linear axis hides the end of the run
METRICS = {"bbox_mAP": "mAP", "bbox_mAP_50": "mAP 50", "bbox_mAP_75": "mAP 75"}


def draw_curves(log_json_paths: Sequence[str | Path], out_png: str | Path) -> Path:
    """Draw losses, learning rate, FPS and (where evaluated) mAP over the steps of the run.

    Several logs (a resumed run) are joined in the order given; of lines for the same step the
    last one counts. UserError if a log is broken or holds no train line.
    """
    train, val = {}, {}
    for path in log_json_paths:
        for line in read_json_log(path):
            if line.get("mode") == "train":
                if "step" not in line:
                    raise UserError(f"{path} has train lines without `step`: not a log of ours")
                train[line["step"]] = line
            elif line.get("mode") == "val":
                val[line["epoch"] * line["iter"]] = line
    if not train:
        raise UserError(f"no curves: {', '.join(map(str, log_json_paths))} has no train line")

    # The total first, so that every run draws it in the same colour.
    terms = sorted({key for line in train.values() for key in line if key.startswith("loss")})
    panels = {
        "loss": (train, {name: name for name in terms}),
        "learning rate": (train, {"lr": None}),
        "images / s": (train, {"fps": None}),
        "COCO AP": (val, METRICS),
    }
    if not val:
        del panels["COCO AP"]
    figure = Figure(figsize=(9, 0.6 + 2.2 * len(panels)), dpi=110, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for ax, (title, (lines, curves)) in zip(axes, panels.items(), strict=True):
        steps = sorted(lines)
        for key, label in curves.items():
            # A gap where the log has null (a non-finite value) or nothing.
            values = np.array([lines[step].get(key) for step in steps], dtype=float)
            marker = "." if len(steps) <= 60 else ""
            ax.plot(steps, values, label=label, marker=marker, linewidth=1.2)
        ax.set_ylabel(title)
        ax.grid(alpha=0.3)
        if len(curves) > 1:
            ax.legend(loc="best", fontsize="small", ncols=4)

    losses = np.concatenate([line.get_ydata() for line in axes[0].lines])
    losses = losses[np.isfinite(losses)]
    if losses.size and losses.min() > 0 and losses.max() / losses.min() > LOG_SCALE_SPAN:
        axes[0].set_yscale("log")
    axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for ax in axes[2:]:  # rates and scores are read against zero
        ax.update_datalim([(min(train), 0)])
        ax.autoscale_view()
        ax.set_ylim(bottom=0)
    axes[-1].set_xlabel("iteration")
    figure.align_ylabels()
    figure.savefig(picture := io.BytesIO(), format="png")
    return write_atomically(out_png, picture.getvalue())
