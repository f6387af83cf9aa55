import json
import os
import re
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from common.fps.meter import Window
from common.fps.runlog import RunLog
from common.npu.distributed import Ranks

METRICS = {
    "bbox_mAP": 0.1230004,
    "bbox_mAP_50": 0.25,
    "bbox_mAP_75": 0.1,
    "bbox_mAP_s": 0.01,
    "bbox_mAP_m": 0.1,
    "bbox_mAP_l": 0.2,
    "bbox_mAP_copypaste": "0.123 0.250 0.100 0.010 0.100 0.200",
}


LOSSES = {"loss_cls": 2.0 + 1e-9, "loss_bbox": 0.75, "loss_centerness": 0.5, "loss": 3.25}
ABOUT = {"env_info": "sys.platform: linux", "config": "lr = 0.1", "seed": 1, "exp_name": "ssd300"}


def window(data_share=0.1, seconds_a_step=0.5, warming_up=False):
    return Window(
        steps=50,
        time=seconds_a_step,
        data_time=data_share * seconds_a_step,
        fps=32 / seconds_a_step,
        fps_average=64.0,
        warming_up=warming_up,
    )


def open_log(folder, rank=0, steps=600, per_epoch=200, device_id=0, num_workers=0):
    log = RunLog(Ranks(rank, rank, 4, 4), num_workers)
    log.open(folder, device_id)
    log.begin(steps, 0, per_epoch)
    return log


def train(log, step, lr=2.5e-06, memory_mib=99, **speed):
    log.train(step, lr, LOSSES, window(**speed), memory_mib)


def write_run(folder, epochs=3, per_epoch=200, interval=50):
    with open_log(folder, steps=epochs * per_epoch, per_epoch=per_epoch) as log:
        log.header(**ABOUT)
        for epoch in range(1, epochs + 1):
            for iter in range(interval, per_epoch + 1, interval):
                seconds = 0.25 * epoch + iter / 1000
                step = (epoch - 1) * per_epoch + iter
                train(log, step, lr=0.01 / epoch, seconds_a_step=seconds)
            log.val(epoch * per_epoch, 0.01 / epoch, METRICS)
    return log.json_path


def json_lines(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_runs_of_the_same_second_have_a_json_log_each(tmp_path):
    paths = []
    for _ in range(3):
        with open_log(tmp_path) as log:
            log.header(**ABOUT)
            paths.append(log.json_path)
    assert paths == sorted(tmp_path.glob("*.log.json"))
    assert [len(json_lines(path)) for path in paths] == [1, 1, 1]


def test_the_text_log_has_a_recipe_as_a_paragraph(tmp_path):
    fields = [f"field_{number} = {number}.5" for number in range(40)]
    with open_log(tmp_path) as log:
        log.header(**{**ABOUT, "config": "\n".join(fields)})
    text = (tmp_path / "train_0.log").read_text().split(" INFO - ", 1)[1]
    assert text.startswith("env_info: sys.platform: linux\nconfig: field_0 = 0.5, field_1 = 1.5, ")
    assert ", ".join(fields) in " ".join(text.split())
    lines = text.splitlines()
    assert len(lines) < 12
    assert max(map(len, lines)) <= 100
    assert json_lines(log.json_path)[0]["config"].splitlines() == fields


def test_a_path_that_is_no_utf8_is_logged_escaped(tmp_path):
    folder = tmp_path / os.fsdecode("数据".encode("gbk"))
    with open_log(folder) as log:
        log.header(**{**ABOUT, "exp_name": folder.name})
        log.info(f"数据 in {folder.name}")
        train(log, 1)
        log.val(1, 0.1, METRICS)
    text = (folder / "train_0.log").read_text()
    assert "数据 in \\udcca\\udcfd\\udcbe\\udcdd\n" in text
    assert json_lines(log.json_path)[0]["exp_name"] == folder.name
    assert text.count("WARNING - no events: tensorboard needs a path in UTF-8, not ") == 1


def test_text_lines_keep_the_known_layout(tmp_path, capsys):
    log = open_log(tmp_path, device_id=3, steps=2 * 9162, per_epoch=9162)
    train(log, 100, lr=3.98e-4, memory_mib=1234, seconds_a_step=6.0)
    log.val(9162, 1e-3, METRICS)
    train(log, 2 * 9162, warming_up=True)
    text = (tmp_path / "train_3.log").read_text()
    assert capsys.readouterr().out == text
    head = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - onestage - INFO - "
    lines = [re.sub(head, "", line) for line in text.splitlines()]
    assert lines == [
        # 18224 steps of 32 images at 64 images a second
        "Epoch [1][100/9162]\tlr: 3.980e-04, eta: 2:31:52, time: 6.000, data_time: 0.600, "
        "memory: 1234, loss_cls: 2.0000, loss_bbox: 0.7500, loss_centerness: 0.5000, "
        "loss: 3.2500, fps: 5.33, fps_avg: 64.00, data_wait: 30.0 s",
        "Epoch(val) [1][9162]\tbbox_mAP: 0.1230, bbox_mAP_50: 0.2500, bbox_mAP_75: 0.1000, "
        "bbox_mAP_s: 0.0100, bbox_mAP_m: 0.1000, bbox_mAP_l: 0.2000, "
        "bbox_mAP_copypaste: 0.123 0.250 0.100 0.010 0.100 0.200",
        "Epoch [2][9162/9162]\tlr: 2.500e-06, eta: 0:00:00, time: 0.500, data_time: 0.050, "
        "memory: 99, loss_cls: 2.0000, loss_bbox: 0.7500, loss_centerness: 0.5000, "
        "loss: 3.2500, fps: 64.00, fps_avg: 64.00 (warm-up), data_wait: 2.5 s",
    ]


def test_json_lines_have_the_known_keys_in_order_rounded(tmp_path):
    log = open_log(tmp_path)
    log.header(**ABOUT)
    train(log, 250, seconds_a_step=1 / 3)
    log.val(300, 2.5e-06, METRICS)  # in the middle of an epoch
    about, line, val = json_lines(log.json_path)
    assert re.fullmatch(r"\d{8}_\d{6}\.log\.json", log.json_path.name)
    assert about == ABOUT
    assert " ".join(line) == (
        "mode epoch iter lr memory data_time loss_cls loss_bbox loss_centerness loss time fps step"
    )
    assert (line["mode"], line["epoch"], line["iter"], line["step"]) == ("train", 2, 50, 250)
    assert (line["lr"], line["time"], line["loss_cls"]) == (2.5e-06, 0.33333, 2.0)
    assert list(val) == ["mode", "epoch", "iter", "lr", *METRICS, "steps_done"]
    assert (val["mode"], val["epoch"], val["iter"]) == ("val", 2, 200)
    assert (val["bbox_mAP"], val["lr"]) == (0.123, 2.5e-06)


def test_nothing_waits_in_a_buffer(tmp_path):
    log = open_log(tmp_path)
    train(log, 50)
    assert len(json_lines(log.json_path)) == 1
    assert log.text_path.read_text().count("Epoch [1][50/200]") == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(50, 3.25)]


@pytest.mark.parametrize("name", ["text_path", "json_path"])
def test_a_log_file_on_a_full_disk_is_named(tmp_path, name):
    message = "/dev/full cannot be written: No space left on device; free space"
    with open_log(tmp_path) as log:
        setattr(log, name, Path("/dev/full"))
        with pytest.raises(UserError, match=message):
            train(log, 50)


def test_a_resumed_run_loses_nothing_of_the_first(tmp_path):
    for words, step in (("before", 50), ("after", 100)):  # maybe within the same second
        with open_log(tmp_path) as log:
            log.header(**ABOUT)
            log.info(words)
            train(log, step)
    text = log.text_path.read_text()
    assert text.index("before") < text.index("after")
    lines = [line for path in sorted(tmp_path.glob("*.log.json")) for line in json_lines(path)]
    assert [line.get("step") for line in lines] == [None, 50, None, 100]


def test_lines_before_the_folder_is_known_wait_for_the_file(tmp_path, capsys):
    log = RunLog(Ranks())
    log.info("early")
    log.warn_of("a.json", ["odd", "odder"])
    shown = capsys.readouterr().out
    log.open(tmp_path, name=0)
    log.info("late")
    text = log.text_path.read_text()
    assert text.startswith(shown)
    messages = [line.split(" - ", 2)[2] for line in text.splitlines()]
    assert messages == [
        "INFO - early",
        "WARNING - a.json: odd",
        "WARNING - a.json: odder",
        "INFO - late",
    ]


def test_other_ranks_write_only_what_ends_them(tmp_path, capsys):
    main = open_log(tmp_path)
    main.info("first")
    before = sorted(tmp_path.rglob("*"))
    with suppress(KeyError), open_log(tmp_path, rank=3) as log:
        log.header(**ABOUT)
        log.info("no")
        log.warning("no")
        train(log, 50)
        log.val(200, 0.1, METRICS)
        log.bar.update()
        raise KeyError("why")
    main.info("last")
    assert sorted(tmp_path.rglob("*")) == before
    messages = [line.split(" - ", 2)[2] for line in main.text_path.read_text().splitlines()]
    assert messages == ["INFO - first", "ERROR - rank 3: KeyError: 'why'", "INFO - last"]
    assert "rank 3" not in capsys.readouterr().out


def test_the_line_says_what_to_do_about_a_slow_loader(tmp_path):
    log = open_log(tmp_path, num_workers=4)
    train(log, 10, data_share=0.2)
    train(log, 20, data_share=0.375)
    fine, slow = log.text_path.read_text().splitlines()
    assert fine.endswith("data_wait: 5.0 s")
    assert "data_wait: 9.4 s (38% of the time: raise --num_workers (now 4), put" in slow


def test_tensorboard_missing_is_one_line_and_no_events(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with open_log(tmp_path) as log:
        train(log, 50)
    assert not (tmp_path / "tensorboard").exists()
    assert len(json_lines(log.json_path)) == 1
    assert log.text_path.read_text().count("tensorboard is not installed") == 1


def test_events_hold_the_run(tmp_path):
    write_run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss_cls", "train/lr", "train/fps", "train/time", "val/bbox_mAP"} <= tags
    assert "val/bbox_mAP_copypaste" not in tags
    assert [e.step for e in events.Scalars("val/bbox_mAP")] == [200, 400, 600]


def test_a_resumed_run_replaces_the_events_after_its_first_step(tmp_path):
    for first_step, lr in ((1, 0.5), (3, 0.25)):
        log = RunLog(Ranks())
        log.open(tmp_path, 0, first_step)
        log.begin(5, first_step - 1, per_epoch=5)
        with log:
            for step in range(first_step, 5):
                train(log, step, lr=lr)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rates = [(event.step, event.value) for event in events.Scalars("train/lr")]
    assert rates == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals_and_leaves_text_lines_whole(
    tmp_path, capsys, monkeypatch, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with open_log(tmp_path) as log:
        log.begin(100, 20, per_epoch=10)
        log.bar.update(30)
        log.info("a line")
    out, err = capsys.readouterr()
    assert out == log.text_path.read_text()
    assert ("20/100" in err) == terminal


# How MMDetection's analyze_logs reads such a file, re-told from its behaviour.


def read_as_mmdet2(path):
    epochs = {}
    for number, entry in enumerate(json_lines(path)):
        if number == 0 or "epoch" not in entry:
            continue
        series = epochs.setdefault(entry.pop("epoch"), defaultdict(list))
        for key, value in entry.items():
            series[key].append(value)
    return epochs


def read_as_mmdet3(path):
    epochs, epoch = {}, 1
    for entry in json_lines(path):
        if len(entry) <= 1:
            continue
        series = epochs.setdefault(epoch, defaultdict(list))
        for key, value in entry.items():
            series[key].append(value)
        epoch = entry.get("epoch", epoch)
    return epochs


@pytest.fixture
def run(tmp_path):
    return SimpleNamespace(path=write_run(tmp_path), steps=list(range(50, 601, 50)))


@pytest.mark.parametrize("key", ["loss", "loss_cls", "lr", "fps"])
def test_mmdet2_plots_our_curves(run, key):
    epochs = read_as_mmdet2(run.path)
    an_epoch = epochs[1]["iter"][-2]
    assert an_epoch == 200
    xs, ys = [], []
    for epoch, series in epochs.items():
        iters = series["iter"][:-1] if series["mode"][-1] == "val" else series["iter"]
        xs += [iter + (epoch - 1) * an_epoch for iter in iters]
        ys += series[key][: len(iters)]
    assert xs == run.steps
    expected = [e for e in json_lines(run.path) if e.get("mode") == "train"]
    assert ys == [entry[key] for entry in expected]


def test_mmdet2_plots_map_and_averages_times(run):
    epochs = read_as_mmdet2(run.path)
    assert [e for e, series in epochs.items() if "val" in series["mode"]] == [1, 2, 3]
    assert [value for s in epochs.values() for value in s["bbox_mAP"]] == [0.123] * 3
    times = np.array([series["time"][1:] for series in epochs.values()])
    np.testing.assert_allclose(times.mean(-1), [0.4, 0.65, 0.9], atol=1e-5)


def test_mmdet3_plots_our_curves_over_step(run):
    epochs = read_as_mmdet3(run.path)
    xs = [step for series in epochs.values() for step in series["step"]]
    ys = [v for series in epochs.values() for v in series["loss"][: len(series["step"])]]
    assert xs == run.steps
    assert ys == [3.25] * 12
    assert all(np.mean(series["time"]) > 0 for series in epochs.values())


def test_figures_and_pictures_of_an_evaluation_are_events_only(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "confusion.png")
    with RunLog(Ranks()) as log:
        log.open(tmp_path, 0)
        figures = {"coco/AP": 0.25, "coco/APsmall": -1.0, "AP of class/cat": 0.5}
        log.add_events(40, figures, [tmp_path / "confusion.png"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["AP of class/cat", "coco/AP"]
    (entry,) = events.Scalars("coco/AP")
    assert (entry.step, entry.value) == (40, 0.25)
    (picture,) = events.Images("pictures/confusion")
    assert (picture.step, picture.width, picture.height) == (40, 8, 6)
    assert not log.json_path.exists()
