"""The start of a program on several devices, up to the first process and from the last one on."""

import logging
import os
import signal
import sys
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from common.errors import UserError
from common.npu import launch

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "fcos" / "train.py")
RANKS = ["--nproc_per_node=8", "--master_addr=127.0.0.1", "--master_port=23456"]


@pytest.fixture(autouse=True)
def _own_process(monkeypatch):
    """`prepare` changes what belongs to the process of the launcher."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def started(monkeypatch):
    """The arguments of the calls of torchrun, which start nothing here."""
    calls = []
    monkeypatch.setattr(launch.torchrun, "run", calls.append)
    return calls


def ending_with(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(launch.torchrun, "run", run)


def failure(exitcode, timestamp):
    made = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="none")
    made.timestamp = timestamp
    return made


def test_a_program_starts_with_its_flags(started):
    assert launch.main([*RANKS, TRAIN, "--data=a", "--seed=3"]) == 0
    (args,) = started
    assert (args.nproc_per_node, args.master_port) == ("8", 23456)
    assert args.training_script == TRAIN
    assert args.training_script_args == ["--data=a", "--seed=3"]
    assert args.shutdown_timeout == launch.SECONDS_TO_STOP


@pytest.mark.parametrize("model", ["ssd_mmdet", "ssd_resnet34", "m2det", "fcos"])
@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_help_is_printed_once_and_starts_nothing(started, capsys, model, program):
    with pytest.raises(SystemExit) as ended:
        launch.main([*RANKS, str(ROOT / model / program), "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: {program} ")
    assert output.count("usage: ") == 1
    assert started == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--learning_rat=3", "unrecognized arguments: --learning-rat=3"),
        ("--batch_size=many", "argument --batch-size/-b: 'many': give a number or 'auto'"),
        ("configs/fcos.py --data=a", "configs/fcos.py: no config file is read"),
    ],
)
def test_a_wrong_flag_is_one_line_and_starts_nothing(started, capsys, words, line):
    with pytest.raises(SystemExit) as ended:
        launch.main([*RANKS, TRAIN, *words.split()])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {line}")
    assert errors.count("\n") == 1
    assert started == []


def test_data_is_checked_once(started, capsys, tmp_path):
    where = [f"--data={ROOT}/tests/data/tiny_coco", f"--output_dir={tmp_path}/run"]
    assert not launch.main([*RANKS, TRAIN, "--check_data", *where])
    assert capsys.readouterr().out.count("instances_train2017.json, images in") == 1
    assert started == []


def test_samples_are_drawn_by_the_launcher_itself(started, capsys, tmp_path):
    where = [f"--data={ROOT}/tests/data/tiny_coco", f"--output_dir={tmp_path}/run"]
    small = ["--recipe=quickstart", "--num_workers=0", "--device=cpu"]
    assert not launch.main([*RANKS, TRAIN, "--look=1", *where, *small])
    assert f"written: {tmp_path}/run_look/epoch_1_1.jpg" in capsys.readouterr().out
    assert started == []


def test_a_number_that_a_recipe_refuses_starts_nothing(started):
    with pytest.raises(UserError, match="--head_norm bn: not one of gn, none"):
        launch.main([*RANKS, TRAIN, "--head_norm=bn"])
    assert started == []


@pytest.mark.parametrize(
    "script", ["fcos/demo.py", "fcos/missing.py", "ssd_resnet34/tfrecord/train.py", "/tmp/train.py"]
)
def test_another_program_is_left_to_torchrun(started, script):
    with pytest.raises(UserError, match=r"not train\.py or evaluate\.py of .+ with torchrun"):
        launch.main([*RANKS, str(ROOT / script)])
    assert started == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_has_its_own_line_and_the_signals_status(monkeypatch, capsys, number, status):
    ending_with(monkeypatch, SignalException("got a signal", sigval=number))
    assert launch.main([*RANKS, TRAIN]) == status
    assert capsys.readouterr().err == f"stopped by {number.name}\n"


@pytest.mark.parametrize(
    ("exitcodes", "status", "line"),
    [
        ({0: 143, 3: 1}, 1, ""),  # the process has said why, torchrun has ended the other
        ({0: -15, 3: 1}, 1, ""),
        ({2: 3, 3: 1}, 3, ""),  # the first
        ({0: 143, 1: 143}, 143, ""),  # signalled from outside
        (
            {0: 1, 5: -9},  # the other has lost its connection
            137,
            "error (rank 5): ended by SIGKILL, often because the memory of the host is full; go on "
            "with --resume=auto\n",
        ),
        ({1: -11, 2: -15}, 139, "error (rank 1): ended by SIGSEGV\n"),
        ({1: -15}, 143, "error (rank 1): ended by SIGTERM\n"),
    ],
)
def test_the_status_is_that_of_the_process_that_failed_by_itself(
    monkeypatch, capsys, exitcodes, status, line
):
    failures = {}
    for time, (rank, exitcode) in enumerate(exitcodes.items()):
        failures[rank] = failure(exitcode, timestamp=time)
    ending_with(monkeypatch, ChildFailedError("train", failures))
    assert launch.main([*RANKS, TRAIN]) == status
    assert capsys.readouterr().err == line


def test_a_port_in_use_is_one_line(monkeypatch):
    ending_with(monkeypatch, DistNetworkError("port 23456 in use\nand a stack"))
    line = r"--master_addr=127.0.0.1 --master_port=23456 \(port 23456 in use\); take a free port"
    with pytest.raises(UserError, match=line):
        launch.main([*RANKS, TRAIN])


NODES = ["--nproc_per_node=8", "--nnodes=2", "--node_rank=1", "--master_port=23456"]
MASTER = "--master_addr=10.77.0.1"
C10D = ["--rdzv_backend=c10d", "--local_addr=10.77.0.2"]


@pytest.fixture
def own_address(monkeypatch):
    """This host's addresses are 10.77.0.2 and, a second one of the same interface, 10.77.0.3."""
    monkeypatch.setattr(launch, "local_addresses", lambda: {"127.0.0.1": "lo", "10.77.0.2": "eth7"})
    local = ("127.0.0.1", "10.77.0.2", "10.77.0.3")
    monkeypatch.setattr(launch, "is_local", lambda address: address in local)
    for name in ("HCCL_IF_IP", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)


def test_a_node_tells_hccl_and_gloo_its_address(started, own_address):
    launch.main([*NODES, MASTER, "--local_addr=10.77.0.2", TRAIN])
    assert len(started) == 1
    assert os.environ["HCCL_IF_IP"] == "10.77.0.2"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.parametrize(("host", "is_host"), [("10.77.0.1", 0), ("10.77.0.2", 1)])
def test_c10d_is_told_which_node_has_the_store(started, own_address, host, is_host):
    launch.main([*NODES, *C10D, f"--rdzv_endpoint={host}:29400", "--rdzv_conf=timeout=9", TRAIN])
    assert started[0].rdzv_conf == f"timeout=9,is_host={is_host}"


def test_the_users_interface_stays(started, own_address, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    launch.main([*NODES, MASTER, "--local_addr=10.77.0.3", TRAIN])
    assert os.environ["HCCL_IF_IP"] == "10.77.0.3"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "bond0"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([MASTER], "--nnodes=2: the other nodes must reach this one; give its address with"),
        ([MASTER, "--local_addr=10.77.0.9"], "--local_addr=10.77.0.9: no interface of this host"),
        ([MASTER, "--local_addr=node1"], "--local_addr=node1: not an IP address; give one of"),
        ([MASTER, "--local_addr=10.77.0.3"], "--local_addr=10.77.0.3: not the first address of"),
        (["--local_addr=10.77.0.2"], "--nnodes=2: 127.0.0.1 is every node itself; give the"),
        ([MASTER, "--nnodes=1:2"], "--nnodes=1:2: not a number"),
        ([MASTER, "--master_port=60007"], "port 60007: HCCL takes 60000 to 60015"),
        ([*C10D, "--rdzv_endpoint=10.77.0.1:60007"], "port 60007: HCCL takes 60000 to 60015"),
        ([*C10D, "--rdzv_endpoint=10.77.0.1"], "--rdzv_endpoint=10.77.0.1: not HOST:PORT"),
        ([*C10D, "--rdzv_endpoint=localhost:29400"], "--nnodes=2: localhost is every node itself"),
        (
            C10D,
            "--rdzv_backend=c10d: the nodes need an address to meet at; give it with",
        ),
    ],
)
def test_nodes_that_could_not_meet_are_refused(started, own_address, words, line):
    with pytest.raises(UserError) as refused:
        launch.main([*NODES, *words, TRAIN])
    assert str(refused.value).startswith(line)
    assert started == []
    assert "HCCL_IF_IP" not in os.environ


def test_the_remedy_names_the_addresses_that_others_reach(started, own_address):
    with pytest.raises(UserError, match=r"--local_addr=IP; it has 10\.77\.0\.2 \(eth7\)$"):
        launch.main([*NODES, MASTER, TRAIN])


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_nohup_stays_in_force(started, monkeypatch, handler):
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    launch.main([*RANKS, TRAIN])
    config, _, _ = launch.torchrun.config_from_args(started[0])
    assert ("SIGHUP" in config.signals_to_handle) == (handler == signal.SIG_DFL)
    assert config.shutdown_timeout == launch.SECONDS_TO_STOP
