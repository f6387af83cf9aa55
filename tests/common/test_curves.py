import json
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from common.errors import UserError
from common.fps.calc_fps import read_json_log
from common.fps.curves import draw_curves


def write_log(path, steps, val_epochs=(), loss=lambda step: 30 / step**0.5):
    lines = [{"env_info": "", "config": "", "seed": 1, "exp_name": "x"}]
    for step in steps:
        total = loss(step)
        parts = {"loss_cls": 0.7 * total, "loss_bbox": 0.3 * total}
        speed = {"time": 0.1, "fps": 300 + step % 7, "step": step}
        about = {"mode": "train", "epoch": 1, "iter": step, "lr": 0.01 if step < 600 else 0.001}
        lines.append(about | parts | {"loss": total} | speed)
    for epoch in val_epochs:
        scores = {"bbox_mAP": 0.05 * epoch, "bbox_mAP_50": 0.1 * epoch, "bbox_mAP_75": 0.04 * epoch}
        lines.append({"mode": "val", "epoch": epoch, "iter": 200, "lr": 0.01} | scores)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def figure(monkeypatch):
    """The figure that was drawn, to be asked what it shows."""
    drawn = []
    save = Figure.savefig

    def keep(self, *args, **options):
        drawn.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def test_a_run_is_drawn_whole(tmp_path, figure):
    log = write_log(tmp_path / "a.log.json", range(10, 1001, 10), val_epochs=[1, 2, 3, 4, 5])
    out = tmp_path / "out" / "curves.png"
    draw_curves([log], out)
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert pixels.std() > 5
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]
    losses, rate, fps, ap = figure[0].axes
    assert [line.get_label() for line in losses.lines] == ["loss", "loss_bbox", "loss_cls"]
    assert losses.get_yscale() == "log"
    assert set(rate.lines[0].get_ydata()) == {0.01, 0.001}
    assert list(fps.lines[0].get_xdata()) == list(range(10, 1001, 10))
    assert list(ap.lines[0].get_xdata()) == [200, 400, 600, 800, 1000]
    assert (fps.get_ylim()[0], ap.get_ylim()[0]) == (0, 0)
    assert {a.get_xlim() for a in (losses, rate, fps)} == {ap.get_xlim()}


def test_no_legend_hides_a_point(tmp_path, figure):
    log = write_log(tmp_path / "a.log.json", range(10, 401, 10), val_epochs=[1, 2])
    draw_curves([log], tmp_path / "curves.png")
    figure[0].canvas.draw()
    for ax in figure[0].axes:
        legend = ax.get_legend().get_window_extent()
        assert legend.x0 > ax.get_window_extent().x1


def test_curves_from_zero_leave_their_largest_point_inside(tmp_path, figure):
    log = write_log(tmp_path / "a.log.json", range(10, 401, 10), val_epochs=[1, 2])
    draw_curves([log], tmp_path / "curves.png")
    _, _, fps, ap = figure[0].axes
    for ax in (fps, ap):
        largest = max(max(line.get_ydata()) for line in ax.lines)
        low, high = ax.get_ylim()
        assert low == 0 < largest < high


def test_a_single_point_and_evaluations_have_dots(tmp_path, figure):
    draw_curves([write_log(tmp_path / "1.log.json", [50])], tmp_path / "curves.png")
    assert figure[0].axes[0].lines[0].get_marker() == "o"
    log = write_log(tmp_path / "2.log.json", range(10, 1001, 10), val_epochs=[1, 2])
    draw_curves([log], tmp_path / "curves.png")
    losses, _, _, ap = figure[1].axes
    assert losses.lines[0].get_marker() == ""
    assert ap.lines[0].get_marker() == "o"


def test_epochs_are_at_the_upper_edge(tmp_path, figure):
    log = write_log(tmp_path / "a.log.json", range(10, 1001, 10), val_epochs=[1, 2])
    draw_curves([log], tmp_path / "curves.png")
    (epochs,) = figure[0].axes[0].child_axes
    assert epochs.get_xlabel() == "epoch"
    steps = np.array(figure[0].axes[0].get_xlim())
    np.testing.assert_allclose(epochs.get_xlim(), steps / 200)
    # Within the first epoch nothing tells how long it is.
    draw_curves([write_log(tmp_path / "b.log.json", [10, 20])], tmp_path / "curves.png")
    assert not figure[1].axes[0].child_axes


def test_the_length_of_an_epoch_is_in_the_lines_of_the_second(tmp_path, figure):
    line = {"mode": "train", "lr": 0.1, "loss": 1.0, "fps": 5.0}
    entries = [{**line, "epoch": 1, "iter": 90, "step": 90}]
    entries.append({**line, "epoch": 3, "iter": 20, "step": 220})
    log = tmp_path / "a.log.json"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    draw_curves([log], tmp_path / "curves.png")
    (epochs,) = figure[0].axes[0].child_axes
    steps = np.array(figure[0].axes[0].get_xlim())
    np.testing.assert_allclose(epochs.get_xlim(), steps / 100)


def test_an_evaluation_stands_at_its_step(tmp_path, figure):
    log = write_log(tmp_path / "a.log.json", range(10, 151, 10))
    scores = {"bbox_mAP": 0.1, "bbox_mAP_50": 0.2, "bbox_mAP_75": 0.1}
    val = {"mode": "val", "epoch": 1, "iter": 200, "lr": 0.01, **scores, "steps_done": 150}
    with log.open("a") as file:
        file.write(json.dumps(val) + "\n")
    draw_curves([log], tmp_path / "curves.png")
    ap = figure[0].axes[-1]
    assert list(ap.lines[0].get_xdata()) == [150]


def test_a_resumed_run_is_joined_and_the_later_log_wins(tmp_path, figure):
    first = write_log(tmp_path / "1.log.json", range(50, 501, 50), loss=lambda _: 2.0)
    second = write_log(tmp_path / "2.log.json", range(300, 801, 50), loss=lambda _: 1.0)
    draw_curves([first, second], tmp_path / "curves.png")
    assert len(figure[0].axes) == 3  # nothing was evaluated
    line = figure[0].axes[0].lines[0]
    assert list(line.get_xdata()) == list(range(50, 801, 50))
    assert all(before <= after for before, after in pairwise(line.get_xdata()))
    assert [y for x, y in zip(*line.get_data(), strict=True) if x < 300] == [2.0] * 5
    assert [y for x, y in zip(*line.get_data(), strict=True) if x >= 300] == [1.0] * 11


def test_a_broken_log_is_named(tmp_path):
    log = write_log(tmp_path / "a.log.json", [10, 20])
    log.write_text(log.read_text()[:-5] + "\n")
    with pytest.raises(UserError, match=r"a\.log\.json as the"):
        draw_curves([log], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_last_line_cut_by_a_lost_machine_does_not_count(tmp_path):
    log = write_log(tmp_path / "a.log.json", [10, 20])
    whole = read_json_log(log)
    log.write_text(log.read_text() + '{"mode": "train", "ep')
    assert read_json_log(log) == whole
