"""Which ranks a host starts and what they are told; what ssd_main refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest

from common.errors import UserError
from ssd_resnet34 import ssd_main
from ssd_resnet34.tfrecord import evaluate, launch, train
from ssd_resnet34.tfrecord.evaluate import validation_records
from ssd_resnet34.tfrecord.index import read_index
from ssd_resnet34.tfrecord.options import parse
from ssd_resnet34.tfrecord.rank_table import Device, RankTable, read_rank_table

TABLES = launch.MODEL_FOLDER / "npu_config"


def table_of(*servers):
    devices = (Device(r, server, 7 - r, f"192.168.0.{r}") for r, server in enumerate(servers))
    return RankTable(tuple(devices))


@pytest.mark.parametrize(
    ("word", "status", "beginning"),
    [
        ("--help", 0, "usage: ssd_main.py "),
        ("--train_batch=3", 2, "error: unrecognized arguments: --train-batch=3"),
    ],
)
def test_help_and_a_wrong_flag_are_answered_once(
    monkeypatch, tmp_path, capsys, word, status, beginning
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["launch.py", word])
    monkeypatch.setenv("RANK_TABLE_FILE", str(TABLES / "8p.json"))
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert ended.value.code == status
    output, errors = capsys.readouterr()
    assert (output + errors).startswith(beginning)
    assert list(tmp_path.iterdir()) == []  # no rank was started


def test_a_rank_finds_the_file_of_flags_from_its_own_folder(monkeypatch, tmp_path, capsys):
    (tmp_path / "flags.json").write_text('{"amp": "O0"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK_TABLE_FILE", raising=False)
    monkeypatch.setattr("sys.argv", ["launch.py", "--config", "flags.json", "--mode=eval"])
    # The rank has read the file and ends by what it lacks first.
    assert launch.main() == 1
    log = (tmp_path / "training/D0/train_0.log").read_text()
    assert "flags.json" not in log
    assert "no checkpoint in --model_dir=result_npu" in log
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("returncodes", "signals", "status", "lines"),
    [
        ([130, 130], [signal.SIGINT, signal.SIGINT], 130, "stopped by SIGINT\n"),
        ([143, -15], [signal.SIGTERM], 143, "stopped by SIGTERM\n"),
        ([1, 143], [signal.SIGTERM], 143, "error: bad data of 0\nlast line of 1\n"),
        ([0, 0], [signal.SIGTERM], 0, ""),  # it came too late
        ([1, -9], [], 137, "error: bad data of 0\nrank 1 was ended by SIGKILL\n"),
    ],
)
def test_what_a_run_ends_with(monkeypatch, tmp_path, capsys, returncodes, signals, status, lines):
    table = tmp_path / "2p.json"
    table.write_text(table_of("127.0.0.1", "127.0.0.1").to_version_1())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["launch.py"])
    monkeypatch.setenv("RANK_TABLE_FILE", str(table))
    last_lines = ["error (rank 0): bad data of 0", "last line of 1"]

    def start_rank(rank, world_size, training_folder, environment, program_flags):
        log = launch.log_file(training_folder, rank)
        log.parent.mkdir(parents=True)
        log.write_text(f"first line\n{last_lines[rank]}\n")
        ended = subprocess.Popen(["true"])
        ended.wait()
        ended.returncode = returncodes[rank]
        return ended

    monkeypatch.setattr(launch, "start_rank", start_rank)
    monkeypatch.setattr(launch, "receive_signals", lambda: signals)
    assert launch.main() == status
    assert capsys.readouterr().err == lines


@pytest.mark.parametrize("script", ["run_npu_1p.sh", "run_npu_8p.sh", "exec_main.sh"])
def test_the_scripts_name_an_interpreter_that_cannot(tmp_path, script):
    without_packages = tmp_path / "python"
    without_packages.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    without_packages.chmod(0o755)
    command = ["bash", launch.MODEL_FOLDER / script]
    if script == "exec_main.sh":
        command += ["0", "1", launch.MODEL_FOLDER]
    for python, status, line in (
        (without_packages, 1, f"error: {sys.executable} has no torch, "),
        (tmp_path / "nowhere", 2, f"error: PYTHON={tmp_path}/nowhere does not exist; unset"),
    ):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHON": str(python)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr.startswith(line)
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "training").exists()


def test_the_loss_of_the_terminal_is_passed_on_to_the_ranks():
    received = launch.receive_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGHUP, signal.SIGTERM]


@pytest.mark.parametrize("ranks", [1, 8])
def test_our_tables_are_the_seeds(ranks):
    table = read_rank_table(TABLES / f"{ranks}p.json")
    assert [device.device_id for device in table.devices] == list(range(ranks))
    assert {device.server for device in table.devices} == {"0.0.0.0"}
    content = json.loads((TABLES / f"{ranks}p.json").read_text())
    assert content["group_list"][0]["device_num"] == str(ranks)


def test_one_host_starts_all_ranks_on_a_free_port(tmp_path):
    found = launch.rank_environments(table_of("a", "a"), {}, tmp_path)
    assert list(found) == [0, 1]
    assert int(found[0]["MASTER_PORT"]) > 1023
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]
    assert found[1]["DEVICE_ID"] == "6"
    assert "RANK_TABLE_FILE" not in found[0]
    assert list(tmp_path.iterdir()) == []


def test_several_hosts_start_their_own_ranks(tmp_path):
    table = table_of("127.0.0.1", "203.0.113.9", "203.0.113.9")
    found = launch.rank_environments(table, {}, tmp_path)
    assert list(found) == [0]
    assert found[0]["MASTER_ADDR"] == "127.0.0.1"
    assert found[0]["MASTER_PORT"] == str(launch.PORT_OF_SEVERAL_HOSTS)
    given = {"SERVER_ID": "203.0.113.9", "MASTER_ADDR": "node0", "MASTER_PORT": "5"}
    found = launch.rank_environments(table, given, tmp_path)
    assert [one["LOCAL_RANK"] for one in found.values()] == ["0", "1"]
    assert (found[2]["MASTER_ADDR"], found[2]["MASTER_PORT"]) == ("node0", "5")
    with pytest.raises(UserError, match="SERVER_ID=b is none of the rank table's: 127"):
        launch.rank_environments(table, {"SERVER_ID": "b"}, tmp_path)
    with pytest.raises(UserError, match=r"which of x1, x2 is this host\? SERVER_ID"):
        launch.rank_environments(table_of("x1", "x2"), {}, tmp_path)


def test_hccl_gets_the_version_form_when_asked(tmp_path):
    table = table_of("a", "a")
    found = launch.rank_environments(table, {"HCCL_RANK_TABLE": "1"}, tmp_path / "training")
    assert read_rank_table(found[1]["RANK_TABLE_FILE"]) == table
    assert json.loads((tmp_path / "training/rank_table.json").read_text())["version"] == "1.0"


def test_the_old_scripts_path_is_seen_from_where_a_rank_runs(tmp_path, monkeypatch):
    (tmp_path / "npu_config").mkdir()
    (tmp_path / "npu_config/8p.json").touch()
    (tmp_path / "training/D0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    old = launch.find_table("../../npu_config/8p.json", tmp_path / "training")
    assert old == tmp_path / "npu_config/8p.json"
    assert os.fspath(launch.find_table("npu_config/8p.json", tmp_path / "training")) == (
        "npu_config/8p.json"
    )


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "needs --training_file_pattern"),
        (["--mode=train"], "needs --training_file_pattern"),
        (["--training_file_pattern=x"], "--mode=train_and_eval needs --validation_file_pattern"),
        (["--mode=eval", "--validation_file_pattern=x"], "--mode=eval needs --val_json_file"),
        (["--mode=train", "--training_file_pattern=/none*"], "matches no file"),
        (
            ["--mode=eval", "--validation_file_pattern=x", "--val_json_file=y", "--model_dir=/no"],
            "no checkpoint in --model_dir=/no; train first",
        ),
    ],
)
def test_refusals(flags, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        ssd_main.main(["--device=cpu", *flags])
    assert list(tmp_path.iterdir()) == []


def test_evaluate_needs_no_training_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--mode=eval needs --validation_file_pattern"):
        evaluate.main(["--device=cpu"])
    flags = ["--validation_file_pattern=x", "--val_json_file=y", "--model_dir=/no"]
    with pytest.raises(UserError, match="no checkpoint in --model_dir=/no; train first"):
        evaluate.main(["--device=cpu", *flags])


def test_train_refuses_to_evaluate():
    flags = ["--training_file_pattern=x", "--validation_file_pattern=x", "--val_json_file=y"]
    with pytest.raises(UserError, match=r"--mode=eval: .* use tfrecord/evaluate\.py or ssd_main"):
        train.main(["--mode=eval", *flags])


def test_an_unknown_mode_no_batch_and_ranks_without_a_launcher(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--mode=predict"], "Train.")
    assert capsys.readouterr().err.startswith("error: argument --mode: invalid choice: 'predict'")
    with pytest.raises(SystemExit, match="2"):
        parse(["--train_batch_size=0"], "Train.")
    assert capsys.readouterr().err.startswith("error: --batch_size 0: must be at least 1")
    monkeypatch.setenv("RANK_SIZE", "8")
    with pytest.raises(UserError, match=r"start several ranks with run_npu_8p\.sh"):
        ssd_main.main(["--mode=train", "--training_file_pattern=x"])


def test_the_seeds_flags_and_their_defaults(golden_dir):
    args = parse(["--train_batch_size", "16", "--num_epochs=2", "--model_dir=here"], "Train.")
    assert (args.batch_size, args.epochs, str(args.output_dir)) == (16, 2.0, "here")
    assert (args.mode, args.keep, args.save_interval) == ("train_and_eval", 32, 5000)
    assert args.log_interval == 100


def test_images_unknown_to_the_annotations_are_found_at_the_start(golden_dir, recipe, tmp_path):
    content = json.loads((golden_dir / "instances_train6.json").read_text())
    content["annotations"] = content["annotations"][:-3]  # which a converter drops

    def check(**changes):
        (tmp_path / "val").write_text(json.dumps(content | changes))
        records = read_index(str(golden_dir / "train2017*"), "flag")
        return validation_records(records, str(tmp_path / "val"))[0]

    ids = [image["id"] for image in content["images"]]
    assert sorted(check().image_ids) == sorted(ids)
    with pytest.raises(UserError, match=rf"record at byte \d+: image {ids[0]} is not in .*val"):
        check(images=content["images"][1:])
    with pytest.raises(UserError, match=r"val has no category 90; see --category_ids"):
        check(categories=content["categories"][:-1], annotations=[])


def test_class_names(golden_dir):
    index = read_index(str(golden_dir / "train2017*"), "flag")
    assert index.class_names[0] == "person"
    assert index.class_names[79] == "toothbrush"
