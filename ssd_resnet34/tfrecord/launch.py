#!/usr/bin/env python3
"""Start a process for every rank of this host: `bash exec_main.sh RANK SIZE FOLDER FLAGS...`.

RANK_TABLE_FILE names the rank table; without one there is a single rank. Rank r runs in
training/D<r> of the current folder, its output goes to train_<r>.log there. The program ends when
all ranks have ended, with a status other than 0 if one of theirs is. It also reads:

    MASTER_ADDR, MASTER_PORT   where rank 0 is reached, instead of the table's host and a free port
    SERVER_ID                  this host's name in a table of several hosts, where it is no address
    HCCL_RANK_TABLE=1          HCCL gets the table too (version 1.0), instead of negotiating
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

from common import flags
from common.errors import UserError
from common.files import write_atomically
from common.npu import entry
from common.npu.addresses import free_port, is_local
from ssd_resnet34.tfrecord.config import RECIPES
from ssd_resnet34.tfrecord.options import parse
from ssd_resnet34.tfrecord.rank_table import RankTable, read_rank_table

MODEL_FOLDER = Path(__file__).resolve().parents[1]
SECONDS_TO_END = 60  # for the other ranks after one has failed
SECONDS_BETWEEN_CHECKS = 0.1
PORT_OF_SEVERAL_HOSTS = 23333  # all of them must know it


def main() -> int:
    program_flags = sys.argv[1:]
    sys.argv[0] = "ssd_main.py"  # the name in the help text
    # Before a rank is started, --help and a mistyped flag are answered once, not in every log.
    args = parse(program_flags, "Train and evaluate on the devices of this host.")
    flags.chosen_recipe(args, RECIPES)
    if args.config:  # a rank starts in another folder
        program_flags = [*program_flags, f"--config={os.path.abspath(args.config)}"]
    training_folder = Path("training").absolute()
    environments = {0: {}}
    world_size = 1
    table_file = os.environ.pop("RANK_TABLE_FILE", "")
    if table_file:
        table = read_rank_table(find_table(table_file, training_folder))
        environments = rank_environments(table, os.environ, training_folder)
        world_size = len(table.devices)
    signals = receive_signals()
    processes = {}
    for rank, environment in environments.items():
        processes[rank] = start_rank(rank, world_size, training_folder, environment, program_flags)
    wait_for_all(list(processes.values()), signals)
    returncodes = {rank: process.returncode for rank, process in processes.items()}
    if signals and have_stopped(list(returncodes.values()), signals[0]):
        print(f"stopped by {signal.Signals(signals[0]).name}", file=sys.stderr)
        return 128 + signals[0]
    print_last_lines(returncodes, training_folder)
    return max(exit_status(returncode) for returncode in returncodes.values())


def find_table(file: str, training_folder: Path) -> Path:
    """Return the path of the rank table.

    A user's path is relative to the current folder, that of the old scripts to where a rank runs.
    """
    path = Path(file)
    path_from_rank = (training_folder / "D0" / file).resolve()
    if not path.exists() and path_from_rank.exists():
        return path_from_rank
    return path


def rank_environments(
    table: RankTable, environment: Mapping[str, str], training_folder: Path
) -> dict[int, dict[str, str]]:
    """Return, for each rank of this host, the variables that torch.distributed and HCCL read.

    `environment` holds what the user has set. Raise UserError where the table has several hosts and
    none of them is clearly this one.
    """
    server = find_this_host(table, environment)
    shared = {}
    if len(table.servers) == 1:
        shared["MASTER_PORT"] = str(free_port())
    else:
        shared["MASTER_PORT"] = str(PORT_OF_SEVERAL_HOSTS)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name in environment:
            shared[name] = environment[name]
    if environment.get("HCCL_RANK_TABLE", "0") != "0":
        file = training_folder / "rank_table.json"
        write_atomically(file, table.to_version_1().encode())
        shared["RANK_TABLE_FILE"] = str(file)
    environments = {}
    for device in table.devices_of(server):
        environments[device.rank] = table.environment(device.rank) | shared
    return environments


def find_this_host(table: RankTable, environment: Mapping[str, str]) -> str:
    names = ", ".join(table.servers)
    if environment.get("SERVER_ID"):
        server = environment["SERVER_ID"]
        if server not in table.servers:
            raise UserError(f"SERVER_ID={server} is none of the rank table's: {names}")
        return server
    if len(table.servers) == 1:
        return table.servers[0]
    local_servers = [server for server in table.servers if is_local(server)]
    if len(local_servers) != 1:
        raise UserError(f"which of {names} is this host? SERVER_ID=... says it")
    return local_servers[0]


def receive_signals() -> list[int]:
    """Let the stop signals no longer end this program; return the list that collects them."""
    received = []

    def receive(number: int, frame: object) -> None:
        received.append(number)

    for number in entry.stop_signals():
        signal.signal(number, receive)
    return received


def log_file(training_folder: Path, rank: int) -> Path:
    return training_folder / f"D{rank}" / f"train_{rank}.log"


def start_rank(
    rank: int,
    world_size: int,
    training_folder: Path,
    environment: dict[str, str],
    program_flags: list[str],
) -> subprocess.Popen:
    """Start the process of a rank in its own session, so that only this program signals it."""
    log = log_file(training_folder, rank)
    print(f"rank {rank} of {world_size}: {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(MODEL_FOLDER / "exec_main.sh", log.parent)
    command = ["bash", "exec_main.sh", str(rank), str(world_size), str(MODEL_FOLDER)]
    if environment:
        command.append(f"--device_id={environment['DEVICE_ID']}")
    command += program_flags
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=log.parent,
            env={**os.environ, **environment, "PYTHON": sys.executable},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_all(processes: list[subprocess.Popen], signals: list[int]) -> None:
    """Wait until all processes have ended.

    Signals are passed on as they arrive. Where a rank fails, the others are killed after a minute.
    """
    passed_on = 0
    failure_time = None
    while any(process.poll() is None for process in processes):
        while passed_on < len(signals):
            send_to_all(processes, signals[passed_on])
            passed_on += 1
        if failure_time is None and any(process.returncode for process in processes):
            failure_time = time.monotonic()
        if failure_time is not None and time.monotonic() > failure_time + SECONDS_TO_END:
            send_to_all(processes, signal.SIGKILL)
        time.sleep(SECONDS_BETWEEN_CHECKS)


def send_to_all(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def have_stopped(returncodes: list[int], number: int) -> bool:
    """Return whether all processes have ended because of a signal, with a checkpoint or at once."""
    return all(exit_status(returncode) == 128 + number for returncode in returncodes)


def exit_status(returncode: int) -> int:
    """Return a process's status as a shell has it: 128 more than the signal that ended it."""
    if returncode < 0:
        return 128 - returncode
    return returncode


def print_last_lines(returncodes: dict[int, int], training_folder: Path) -> None:
    """Print the last line of each failed rank's log; ranks that say the same print it once.

    A rank that a signal has ended could not say why.
    """
    printed = set()
    for rank, returncode in returncodes.items():
        if returncode == 0:
            continue
        text = log_file(training_folder, rank).read_text(errors="replace").strip()
        last_line = f"rank {rank} failed"
        if returncode < 0:
            last_line = f"rank {rank} was ended by {signal.Signals(-returncode).name}"
        elif text:
            last_line = text.splitlines()[-1]
        line = re.sub(r"^error \(rank \d+\)", "error", last_line)
        if line not in printed:
            print(line, file=sys.stderr)
            printed.add(line)


if __name__ == "__main__":
    entry.run(main)
