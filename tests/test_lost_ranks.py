"""A rank or a node of two hosts is lost: all ranks start anew and the run is the same.

The hosts are two network namespaces; processes are really killed.
"""

import os
import signal
import subprocess
from contextlib import suppress

import pytest

from tests import scripts

pytestmark = [pytest.mark.slow, pytest.mark.again]
SCRIPT = scripts.MODEL / "test/train_performance_multinodes.sh"
FLAGS = (
    *scripts.SMALL,
    "--num_workers=0",
    "--max_iters=7",
    "--log_interval=1",
    "--save_interval=2",
)
MASTER = ("--nnodes=2", "--master_addr=10.77.0.1", "--master_port=23333", "--max_restarts=2")


@pytest.fixture
def start_node(two_hosts, tmp_path):
    """Start the command of a node; what is still running at the end is killed."""
    data = scripts.subset(tmp_path / "coco", train=28)
    started = []

    def start(node):
        own = (f"--node_rank={node}", f"--local_addr=10.77.0.{node + 1}", "--nproc_per_node=1")
        where = (f"--data_path={data}", f"--output_dir={tmp_path}/{node}")
        process = subprocess.Popen(
            ["ip", "netns", "exec", two_hosts[node], "bash", SCRIPT, *FLAGS, *MASTER, *own, *where],
            env=scripts.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in scripts.family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)


@pytest.mark.parametrize("lost", ["rank", "node"])
def test_what_is_lost_comes_back_and_the_run_is_the_same(start_node, tmp_path, lost):
    nodes = [start_node(0), start_node(1)]
    output = tmp_path / "0"
    scripts.wait_for_step(output, 3, nodes[0])
    if lost == "rank":
        (rank,) = scripts.children(nodes[1].pid)
        os.kill(rank, signal.SIGKILL)
    else:
        scripts.signal_all(nodes[1], signal.SIGKILL)
        nodes[1] = start_node(1)
    assert [node.wait(240) for node in nodes] == [0, 0]
    log = (output / "train_2.log").read_text()
    assert "the launcher has started all ranks anew" in log
    assert "resumed from" in log
    assert not list(tmp_path.glob("1/iter_*.pt"))
    whole = tmp_path / "whole"
    where = (f"--data={tmp_path}/coco", f"--output_dir={whole}", "--recipe=8p", "--kind=perf")
    scripts.run("train.py", *FLAGS, *where, "--epochs=1", ranks=2)
    assert scripts.losses(output) == scripts.losses(whole)
    assert len(scripts.losses(output)) == 7
