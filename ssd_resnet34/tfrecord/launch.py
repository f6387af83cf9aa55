#!/usr/bin/env python3
"""Start a process for every rank of this host: `bash exec_main.sh RANK SIZE FOLDER FLAGS...`.

RANK_TABLE_FILE names the rank table; without one there is a single rank. Rank r runs in
training/D<r> of the current folder, its output goes to train_<r>.log there. Ends when all have
ended, with a status other than 0 if one of theirs is. From the environment, too:

    MASTER_ADDR, MASTER_PORT   where rank 0 is reached, instead of the table's host and a free port
    SERVER_ID                  this host's name in a table of several hosts, where it is no address
    HCCL_RANK_TABLE=1          HCCL gets the table too (version 1.0), instead of negotiating
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

from common.errors import UserError
from common.files import write_atomically
from common.npu import entry
from ssd_resnet34.tfrecord.rank_table import RankTable, read_rank_table

MODEL = Path(__file__).resolve().parents[1]
GRACE = 60  # seconds that the others have to end after a rank that failed
SEVERAL_HOSTS_PORT = 23333  # which all of them must know


def main() -> int:
    training = Path("training").absolute()
    file = os.environ.pop("RANK_TABLE_FILE", "")
    environments, size = {0: {}}, 1
    if file:
        table = read_rank_table(_resolved(file, training))
        environments, size = rank_environments(table, os.environ, training), len(table.devices)
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    ranks = {rank: _start(rank, size, training, own) for rank, own in environments.items()}
    _wait(list(ranks.values()), signals)
    for line in dict.fromkeys(
        _last_line(training, rank) for rank, process in ranks.items() if process.returncode
    ):
        print(line, file=sys.stderr)
    return max(abs(process.returncode) for process in ranks.values())


def rank_environments(table: RankTable, given: dict, training: Path) -> dict[int, dict[str, str]]:
    """By rank of this host, what torch.distributed and HCCL read. Raises UserError where the table
    has several hosts and none of them is clearly this one."""
    servers = list(dict.fromkeys(device.server for device in table.devices))
    server = given.get("SERVER_ID") or _this_host(servers)
    if server not in servers:
        raise UserError(f"SERVER_ID={server} is none of the rank table's: {', '.join(servers)}")
    shared = {"MASTER_PORT": str(_free_port() if len(servers) == 1 else SEVERAL_HOSTS_PORT)}
    shared |= {name: given[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in given}
    if given.get("HCCL_RANK_TABLE", "0") != "0":
        shared["RANK_TABLE_FILE"] = str(training / "rank_table.json")
        write_atomically(training / "rank_table.json", table.version_form().encode())
    mine = (device.rank for device in table.devices if device.server == server)
    return {rank: table.environment(rank) | shared for rank in mine}


def _this_host(servers: list[str]) -> str:
    local = [server for server in servers if len(servers) == 1 or _is_local(server)]
    if len(local) != 1:
        raise UserError(f"which of {', '.join(servers)} is this host? SERVER_ID=... says it")
    return local[0]


def _is_local(server: str) -> bool:
    try:
        with socket.socket() as probe:
            probe.bind((server, 0))
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _resolved(file: str, training: Path) -> Path:
    """The old scripts' path is relative to where a rank runs, a user's to the current folder."""
    from_rank = (training / "D0" / file).resolve()
    return from_rank if from_rank.exists() and not Path(file).exists() else Path(file)


def _log(training: Path, rank: int) -> Path:
    return training / f"D{rank}" / f"train_{rank}.log"


def _start(rank: int, size: int, training: Path, environment: dict) -> subprocess.Popen:
    """The process of a rank, in a session of its own: only this program passes signals on to it."""
    log = _log(training, rank)
    print(f"rank {rank} of {size}: {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(MODEL / "exec_main.sh", log.parent)
    flags = [f"--device_id={environment['DEVICE_ID']}"] if environment else []
    with log.open("wb") as output:
        return subprocess.Popen(
            ["bash", "exec_main.sh", str(rank), str(size), str(MODEL), *flags, *sys.argv[1:]],
            cwd=log.parent,
            env={**os.environ, **environment, "PYTHON": sys.executable},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: list[subprocess.Popen], signals: list[int]) -> None:
    """Until all have ended; signals are passed on, and a rank's failure ends the others."""
    passed, failed_at = 0, None
    while any(process.poll() is None for process in processes):
        for number in signals[passed:]:
            _send(processes, number)
        passed = len(signals)
        if failed_at is None and any(process.returncode for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + GRACE:
            _send(processes, signal.SIGKILL)
        time.sleep(0.1)


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _last_line(training: Path, rank: int) -> str:
    """What a rank said last, the same for all ranks that tell the same."""
    lines = _log(training, rank).read_text(errors="replace").strip().splitlines()
    return re.sub(r"^error \(rank \d+\)", "error", lines[-1] if lines else f"rank {rank} failed")


if __name__ == "__main__":
    entry.run(main)
