#!/usr/bin/env python3
"""Start a program on several devices with torchrun, whose flags come before the program's.

    python3 common/npu/launch.py --nproc_per_node=8 fcos/train.py --data=coco

    ... --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --local_addr=10.0.0.1 fcos/train.py ...

The program's flags are read before a process is started, so that `--help` and a mistyped flag are
answered once; `--check_data`, `--look` and `--replay` need no more than this process. A run that is
stopped ends with 130 for Ctrl-C or 143 for SIGTERM, a run that fails with the status of the process
that failed: the processes have said why.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common.npu import interpreter  # before torch

sys.excepthook = interpreter.hide_interrupt

# isort: split

import importlib
import ipaddress
import logging
import os
import signal
import time
from argparse import Namespace
from types import ModuleType

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from common import flags
from common.errors import UserError
from common.npu import entry
from common.npu.addresses import PORTS_OF_HCCL, is_local, local_addresses

PROGRAMS = ("train.py", "evaluate.py")  # of each model, for several devices
ALONE = ("check_data", "look", "replay")  # flags of what this process does by itself
SECONDS_TO_STOP = 300  # for the step that runs, an evaluation at most, and the checkpoint


def main(argv: list[str] | None = None) -> int | None:
    args = torchrun.parse_args(argv)
    program = find_program(Path(args.training_script))
    program_args = parse_flags(program, args.training_script, args.training_script_args)
    if any(vars(program_args).get(flag) for flag in ALONE):
        return program.main(args.training_script_args)
    require_reachable(args)
    prepare(args)
    try:
        torchrun.run(args)
    except SignalException as stopped:
        print(f"stopped by {signal.Signals(stopped.sigval).name}", file=sys.stderr)
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        return exit_status(failed)
    except dist.DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the processes do not meet at --master_addr={args.master_addr} "
            f"--master_port={args.master_port} ({reason})",
            "take a free port and the address of node 0",
        ) from error
    return 0


def find_program(script: Path) -> ModuleType:
    """Return the module of a model's program; raise UserError for another file."""
    path = script.resolve()
    if path.name not in PROGRAMS or path.parents[1] != ROOT or not path.is_file():
        raise UserError(
            f"{script}: not {' or '.join(PROGRAMS)} of a model's folder",
            "start any other program with torchrun",
        )
    return importlib.import_module(f"{path.parent.name}.{path.stem}")


def parse_flags(program: ModuleType, name: str, program_flags: list[str]) -> Namespace:
    """Let a program parse its flags: it exits for --help, where it has this name, and for a fault.

    Raise UserError for a value that the recipe refuses.
    """
    sys.argv = [name, *program_flags]
    program_args = program.parse(program_flags)
    flags.chosen_recipe(program_args, program.RECIPES)
    return program_args


def require_reachable(args: Namespace) -> None:
    """Raise UserError where the nodes could not meet, or HCCL needs the port that they meet at.

    Nodes meet at --master_addr, or at an --rdzv_endpoint if one is given. HCCL and gloo are told
    this node's address: by themselves they take what the host name resolves to, often 127.0.1.1,
    which no other node reaches.
    """
    fewest, _, most = args.nnodes.partition(":")  # torchrun's default is "1:1"
    if not fewest.isdecimal() or most not in ("", fewest):
        raise UserError(
            f"--nnodes={args.nnodes}: not a number",
            "give that of the hosts; it stays, because another global batch is another training",
        )
    several = int(fewest) > 1
    host = args.master_addr
    port = args.master_port
    if args.rdzv_endpoint:
        host, _, port_of_endpoint = args.rdzv_endpoint.partition(":")
        if not host or not port_of_endpoint.isdecimal():
            raise UserError(f"--rdzv_endpoint={args.rdzv_endpoint}: not HOST:PORT", "give both")
        port = int(port_of_endpoint)
    elif args.rdzv_backend != "static":
        raise UserError(
            f"--rdzv_backend={args.rdzv_backend}: the nodes need an address to meet at",
            "give it with --rdzv_endpoint=HOST:PORT",
        )
    if port in PORTS_OF_HCCL:
        raise UserError(
            f"port {port}: HCCL takes {PORTS_OF_HCCL[0]} to {PORTS_OF_HCCL[-1]} for itself",
            "give another one",
        )
    if several and not args.local_addr:
        raise UserError(
            f"--nnodes={args.nnodes}: the other nodes must reach this one",
            f"give its address with --local_addr=IP; it has {listing(local_addresses())}",
        )
    if not args.local_addr:
        return
    interface = interface_of(args.local_addr)
    if several and is_loopback(host) and not is_loopback(args.local_addr):
        raise UserError(
            f"--nnodes={args.nnodes}: {host} is every node itself",
            "give the address of node 0 with --master_addr=IP, the same on every node",
        )
    if args.rdzv_backend == "c10d" and "is_host" not in args.rdzv_conf:
        # torch looks up this host's name for that, which need not lead to the address.
        is_host = f"is_host={int(is_local(host))}"
        args.rdzv_conf = f"{args.rdzv_conf},{is_host}" if args.rdzv_conf else is_host
    os.environ["HCCL_IF_IP"] = args.local_addr
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str:
    """Return the interface of this host that has an address; raise UserError where none has."""
    interfaces = local_addresses()
    remedy = f"give one of {listing(interfaces)}"
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise UserError(f"--local_addr={address}: not an IP address", remedy) from None
    if not is_local(address):
        raise UserError(f"--local_addr={address}: no interface of this host has it", remedy)
    if address in interfaces:
        return interfaces[address]
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return os.environ["GLOO_SOCKET_IFNAME"]
    raise UserError(
        f"--local_addr={address}: not the first address of its interface",
        f"set GLOO_SOCKET_IFNAME to the interface's name, or {remedy}",
    )


def listing(interfaces: dict[str, str]) -> str:
    """Return the addresses of this host that another may reach; the others where there are none."""
    outside = []
    for address in interfaces:
        number = ipaddress.ip_address(address)
        if not number.is_loopback and not number.is_link_local:
            outside.append(address)
    return ", ".join(f"{address} ({interfaces[address]})" for address in outside or interfaces)


def is_loopback(address: str) -> bool:
    """Return whether an address, or the name of a host, is each host's own."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def prepare(args: Namespace) -> None:
    """Set what torchrun takes from its flags, its environment and the logging module.

    The flags are those of newer versions, which older ones do not read.
    """
    # When this start was, for ranks that are started anew.
    os.environ.setdefault("ONESTAGE_LAUNCH_TIME", str(time.time()))
    # torchrun says so in five lines.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if vars(args).get("shutdown_timeout") is None:
        args.shutdown_timeout = SECONDS_TO_STOP
    # torchrun would take a signal that `nohup` has switched off.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        args.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"
    # What it logs about signals and statuses is raised as well.
    logging.disable(logging.ERROR)


def exit_status(failed: ChildFailedError) -> int:
    """Return the status of a run of which processes failed; say which was ended by a signal.

    torchrun sends SIGTERM to the other processes when one has failed, and these fail too.
    """
    failures = sorted(failed.failures.items(), key=lambda item: item[1].timestamp)
    ended_by_torchrun = (-signal.SIGTERM, 128 + signal.SIGTERM)
    by_themselves = [item for item in failures if item[1].exitcode not in ended_by_torchrun]
    by_signal = [item for item in by_themselves if item[1].exitcode < 0]
    rank, failure = [*by_signal, *by_themselves, *failures][0]
    if failure.exitcode >= 0:
        return failure.exitcode
    number = signal.Signals(-failure.exitcode)
    advice = ""
    if number == signal.SIGKILL:
        advice = ", often because the memory of the host is full; go on with --resume=auto"
    print(f"error (rank {rank}): ended by {number.name}{advice}", file=sys.stderr)
    return 128 + number


if __name__ == "__main__":
    entry.run(main)
