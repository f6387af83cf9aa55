import ast
import json
import subprocess
import sys

import pytest

from common.errors import UserError
from common.fps.calc_fps import fps_per_epoch, main, read_json_log
from common.fps.meter import Window
from common.fps.runlog import RunLog
from common.npu.distributed import Ranks


def entry(mode, epoch, iter, time=None):
    return {"mode": mode, "epoch": epoch, "iter": iter} | ({"time": time} if time else {})


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def old_calc_fps(path, cards, batch):
    """The original's rule, re-told: rates beyond iteration 50, a mean at each val line."""
    printed, rates, means = [], [], []
    with open(path) as lines:
        for line in map(json.loads, lines):
            if line.get("mode") == "train" and line["iter"] > 50:
                rates.append(cards * batch / line["time"])
            if line.get("mode") == "val":
                means.append(sum(rates) / len(rates))
                printed.append({"epoch": len(means), "fps": means[-1]})
                rates = []
    return [*printed, {"fps": sum(means) / len(means)}]


def test_a_log_of_ours_gives_what_the_original_gave(tmp_path, capsys):
    with RunLog(Ranks()) as log:
        log.open(tmp_path, name=0)
        log.header(env_info="env", config="config", seed=1, exp_name="x")
        log.begin(450, 0, per_epoch=150)
        for step in range(50, 451, 50):
            time = 1 / 3 + step / 1500 + step % 150 / 700
            window = Window(50, time, 0.01, 64 / time, 64 / time, False)
            log.train(step, 0.01, {"loss": 1.0}, window, memory_mib=1)
            if step % 150 == 0:
                log.val(step, 0.01, {"bbox_mAP": 0.1})
    capsys.readouterr()
    main([str(log.json_path), "8", "8"])
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == old_calc_fps(log.json_path, 8, 8)


def test_without_val_lines_the_whole_log_counts(tmp_path, capsys):
    lines = [{"seed": 1}, *(entry("train", 1, i, t) for i, t in [(50, 9.0), (100, 0.5), (150, 2)])]
    main([write(tmp_path / "x.log.json", lines), "2", "4"])
    assert capsys.readouterr().out == "{'epoch': 1, 'fps': 10.0}\n{'fps': 10.0}\n"


def test_lines_after_the_last_val_line_do_not_count():
    lines = [entry("train", 1, 100, 0.5), entry("val", 1, 100), entry("train", 2, 100, 0.1)]
    assert fps_per_epoch(lines, 1, 1) == [2.0]


def test_short_epochs_count_all_their_lines_and_empty_ones_do_not_count():
    lines = [entry("train", 4, 10, 0.5), entry("train", 4, 50, 0.25), entry("val", 4, 50)]
    assert fps_per_epoch([*lines, entry("val", 4, 50)], 1, 1) == [3.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no train line"),
        ('{"seed": 1}\n', "no train line"),
        ('{"mode": "train"\n', "x.log.json as the .log.json of a run"),
        ("[1]\n", "x.log.json as the .log.json of a run"),
        ('[{"image_id": 1, "bbox": [], "score": 0.5}]\n', "x.log.json as the .log.json of a run"),
        ("\xff", "x.log.json as the .log.json of a run"),
        (None, "x.log.json as the .log.json of a run"),
    ],
)
def test_a_bad_log_is_one_line_and_status_1(tmp_path, capsys, content, message):
    path = tmp_path / "x.log.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit) as ended:
        main([str(path), "1", "1"])
    assert ended.value.code.startswith("error: ")  # to stderr, with status 1
    assert message in ended.value.code
    assert "\n" not in ended.value.code
    assert capsys.readouterr().out == ""


def test_a_log_without_train_lines_is_the_users_to_mend():
    with pytest.raises(UserError, match="no train line"):
        fps_per_epoch([entry("val", 1, 100)], 1, 1)


def mmengine_entry(epoch, iteration, seconds, names=("loss", "time")):
    """A train line of mmengine's scalars.json; `iteration` counts from the first epoch on."""
    loss, time = names
    line = {"lr": 0.002, "data_time": 0.01, loss: 1.5, time: seconds}
    return line | {"epoch": epoch, "iter": iteration, "memory": 9000, "step": iteration}


def mmengine_val(epoch):
    return {"coco/bbox_mAP": 0.21, "coco/bbox_mAP_50": 0.39, "step": epoch}


@pytest.mark.parametrize("names", [("loss", "time"), ("train/loss", "train/time")])
def test_the_log_of_mmengine_gives_what_that_of_mmdetection_gives(tmp_path, names):
    mmengine, mmdetection = [], []
    for epoch in (1, 2):
        for step in (50, 100, 150, 180):  # the last line of an epoch may come earlier
            time = 0.1 * epoch + step / 1000
            mmengine.append(mmengine_entry(epoch, 180 * (epoch - 1) + step, time, names))
            mmdetection.append(entry("train", epoch, step, time))
        mmengine.append(mmengine_val(epoch))
        mmdetection.append(entry("val", epoch, 180))
    expected = fps_per_epoch(mmdetection, 8, 4)
    assert len(expected) == 2
    path = write(tmp_path / "scalars.json", mmengine)
    assert fps_per_epoch(read_json_log(path), 8, 4) == expected
    # A run that was resumed begins with its second epoch.
    path = write(tmp_path / "resumed.json", mmengine[5:])
    assert fps_per_epoch(read_json_log(path), 8, 4) == expected[1:]
    # Early versions of mmengine write less.
    for line in mmengine:
        line.pop("iter", None)
        line.pop("memory", None)
    path = write(tmp_path / "early.json", mmengine)
    assert fps_per_epoch(read_json_log(path), 8, 4) == expected


def test_a_log_of_mmengine_without_epochs_is_one(tmp_path):
    lines = []
    for iteration, seconds in [(50, 9.0), (100, 0.5), (150, 2.0)]:
        line = mmengine_entry(1, iteration, seconds)
        del line["epoch"]
        lines.append(line)
    path = write(tmp_path / "scalars.json", lines)
    assert fps_per_epoch(read_json_log(path), 2, 4) == [10.0]


@pytest.mark.parametrize("form", ["mmdetection", "mmengine"])
@pytest.mark.parametrize("time", [0, 0.0, -1, None, "fast", float("nan")])
def test_a_train_line_without_a_time_is_one_line_and_status_1(tmp_path, form, time):
    line = {"epoch": 3, "iter": 100, "loss": 1.0, "time": time}
    if time is None:
        del line["time"]
    if form == "mmdetection":
        line["mode"] = "train"
    else:
        line["step"] = 100
    path = write(tmp_path / "x.log.json", [line])
    with pytest.raises(SystemExit) as ended:
        main([path, "1", "1"])
    assert ended.value.code.startswith("error: the train line of epoch 3, iter ")
    assert f"has the time {time}; give a log whose lines" in ended.value.code


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        (["0", "8"], "argument GPU_NUMS: 0: give at least 1"),
        (["8", "0"], "argument BATCH_SIZE: 0: give at least 1"),
        (["eight", "8"], "argument GPU_NUMS: eight: give a whole number from 1 on"),
        (["8"], "the following arguments are required: BATCH_SIZE"),
    ],
)
def test_a_wrong_number_is_one_line_and_status_2(tmp_path, capsys, numbers, named):
    path = write(tmp_path / "x.log.json", [entry("train", 1, 100, 0.5)])
    with pytest.raises(SystemExit) as ended:
        main([path, *numbers])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {named} (--help lists the flags)\n"


def test_it_runs_as_a_module_without_torch(tmp_path):
    path = write(tmp_path / "x.log.json", [entry("train", 1, 100, 0.5), entry("val", 1, 100)])
    command = [sys.executable, "-X", "importtime", "-m", "common.fps.calc_fps", path, "8", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "{'epoch': 1, 'fps': 512.0}\n{'fps': 512.0}\n"
    assert "torch" not in done.stderr


def test_a_whole_last_line_counts_without_its_newline(tmp_path):
    line = {"mode": "train", "epoch": 1, "iter": 60, "time": 0.5}
    (tmp_path / "x.log.json").write_text(json.dumps(line))
    assert read_json_log(tmp_path / "x.log.json") == [line]
    (tmp_path / "x.log.json").write_text(json.dumps(line) + "\n" + json.dumps(line)[:-5])
    assert read_json_log(tmp_path / "x.log.json") == [line]


@pytest.mark.parametrize("time", [float("inf"), 1e-320, True])
def test_a_time_that_is_no_time_is_refused(time):
    with pytest.raises(UserError, match="has the time"):
        fps_per_epoch([{"mode": "train", "epoch": 1, "iter": 60, "time": time}], 8, 32)


def test_the_number_of_a_broken_line_is_said(tmp_path):
    (tmp_path / "x.log.json").write_text('{"mode": "train"}\n\n{"mode": "val"}\n')
    with pytest.raises(UserError, match=r"line 2: Expecting value"):
        read_json_log(tmp_path / "x.log.json")
