"""The training curves of a run as one picture, from its JSON logs."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from common.fps.calc_fps import read_json_log
from common.fps.summary import write_atomically
from common.npu.errors import UserError

LOG_SCALE_SPAN = 20  # largest / smallest loss from which a linear axis hides the end of the run
METRICS = {"bbox_mAP": "mAP", "bbox_mAP_50": "mAP 50", "bbox_mAP_75": "mAP 75"}


def draw_curves(log_json_paths: str | Path | Sequence[str | Path], out_png: str | Path) -> Path:
    """Draw losses, learning rate, FPS and (where evaluated) mAP over the steps of the run.

    Several logs (a resumed run) are joined in the order given; of lines for the same step the
    last one counts. UserError if a log is broken or holds no train line.
    """
    if isinstance(log_json_paths, (str, Path)):
        log_json_paths = [log_json_paths]
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

    steps, lines = zip(*sorted(train.items()), strict=True)
    # The total first, so that every run draws it in the same colour.
    terms = sorted({key for line in lines for key in line if key.startswith("loss")})
    losses = {name: [_number(line.get(name)) for line in lines] for name in terms}
    panels = 4 if val else 3
    figure = Figure(figsize=(9, 0.6 + 2.2 * panels), dpi=110, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True)
    style = {"marker": "." if len(steps) <= 60 else "", "linewidth": 1.2}

    for name, values in losses.items():
        axes[0].plot(steps, values, label=name, **style)
    if _spans([value for values in losses.values() for value in values]):
        axes[0].set_yscale("log")
    axes[0].set_ylabel("loss")
    axes[1].plot(steps, [_number(line.get("lr")) for line in lines], **style)
    axes[1].set_ylabel("learning rate")
    axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes[2].plot(steps, [_number(line.get("fps")) for line in lines], **style)
    axes[2].set_ylabel("images / s")
    if val:
        at, metrics = zip(*sorted(val.items()), strict=True)
        for key, label in METRICS.items():
            values = [_number(line.get(key)) for line in metrics]
            axes[3].plot(at, values, marker="o", markersize=4, linewidth=1.2, label=label)
        axes[3].set_ylabel("COCO AP")
    for ax in axes[2:]:  # rates and scores are read against zero
        ax.update_datalim([(steps[0], 0)])
        ax.autoscale_view()
        ax.set_ylim(bottom=0)
    for ax in axes:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="best", fontsize="small", ncols=4)
    axes[-1].set_xlabel("iteration")
    figure.align_ylabels()

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return write_atomically(Path(out_png), picture.getvalue())


def _number(value: float | None) -> float:
    """A gap in the curve where the log has null (a non-finite value) or nothing."""
    return math.nan if value is None else value


def _spans(values: list[float]) -> bool:
    """Whether the positive values are spread so wide that only a log scale shows them all."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > LOG_SCALE_SPAN
