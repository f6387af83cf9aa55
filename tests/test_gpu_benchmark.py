"""`benchmarks/gpu.py` on a CPU with tiny networks: its course, its tables, and what fails in it."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import PROGRAMS
from tests.scripts import ROOT

TINY = ("--device=cpu", "--tiny")
STEP = {"kind": "step", "model": "fcos", "precision": "fp16", "batch": 2, "memory_mib": 900}


def result(part, *figures, failure=""):
    return gpu.Result(part, list(figures), failure, seconds=1.0)


def cells(text, *first):
    """The cells of the table rows that begin with these."""
    start = "| " + " | ".join(first) + " |"
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_what_fails_is_told_and_the_rest_goes_on(tmp_path, capfd):
    output = tmp_path / "gpu.md"
    parts = ("matrix", "step nobody", "step ssd_mmdet")
    assert gpu.main([str(output), *TINY, "--parts", *parts]) == 1
    text = output.read_text()
    assert [row[2] for row in cells(text, "ssd_mmdet", "fp32")] == ["2", "4"]
    assert "`aten::mkldnn_convolution`" in text or "`aten::convolution_backward`" in text
    assert "matrix rate, fp32: " in text
    (failure,) = [line for line in text.splitlines() if line.startswith("- step nobody: ")]
    assert failure.startswith("- step nobody: exit status 1: ")
    assert failure.endswith("KeyError: 'nobody'")


@pytest.mark.slow
@pytest.mark.again
@pytest.mark.parametrize(
    "part",
    [*(f"step {name}" for name in PROGRAMS), *(f"compiled {name}" for name in PROGRAMS),
     *(f"peer {name}" for name in gpu.PEERS)],
)  # fmt: skip
def test_each_part(part, tmp_path):
    output = tmp_path / "gpu.md"
    words = [str(output), *TINY, "--seconds=800", "--parts", part]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    text = output.read_text()
    assert done.returncode == 0, text
    assert text.endswith("## What failed\n\nNothing.\n")
    what, _, name = part.partition(" ")
    if what != "peer":
        rows = cells(text, name, "fp32")
        assert [row[3].startswith("yes") for row in rows] == [what == "compiled"] * 2


def test_a_part_that_hangs_is_ended_and_what_it_printed_counts(tmp_path, monkeypatch):
    program = tmp_path / "benchmarks" / "gpu.py"
    program.parent.mkdir()
    line = json.dumps({"kind": "rate", "precision": "fp16", "flops": 9e14})
    program.write_text(f"import time\nprint('''{line}''', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    ended = gpu.run_part("matrix", gpu.parse([*TINY]), limit=2.0)
    assert ended.failure == "not done after 2 s"
    assert ended.figures == [json.loads(line)]
    assert ended.seconds < 60


def test_the_parts_share_the_time():
    parts = ["step fcos", "step m2det", "compiled fcos"]  # 3, 3 and 4 shares
    assert gpu.share_of_time(parts, 80) == 24
    assert gpu.share_of_time(parts[2:], 30) == 30
    assert gpu.share_of_time(parts, -5) == 0


def test_the_tables():
    slow = {**STEP, "images_per_second": 100.0, "flops": 1e12}
    fast = {**STEP, "images_per_second": 150.0, "compile_seconds": 41.7}
    large = {**STEP, "images_per_second": 200.0, "flops": 1e12, "batch": 64}
    rate = {"kind": "rate", "precision": "fp16", "flops": 5e14}
    peer = {
        "kind": "peer", "peer": "fcos_resnet50_fpn", "model": "fcos", "precision": "fp16",
        "batch": 2, "images_per_second": 50.0,
    }  # fmt: skip
    text = gpu.report(
        [
            result("matrix", rate),
            result("step fcos", slow, large),
            result("peer fcos_resnet50_fpn", peer),
            result("compiled fcos", fast, {"kind": "left_out", "what": "the largest batch"}),
            result("step m2det", {"kind": "failed", "what": "batch 512: memory"}),
        ],
        where=["device: cuda:0 H100"],
        tiny=False,
    )
    rows = cells(text, "fcos", "fp16")
    assert rows == [
        ["fcos", "fp16", "2", "no", "100.0", "0.200", "900", "150"],
        ["fcos", "fp16", "64", "no", "200.0", "0.400", "900", ""],
        ["fcos", "fp16", "2", "yes (42 s)", "150.0", "0.300", "900", ""],
    ]
    ratios = [row[-1] for row in cells(text, "torchvision fcos_resnet50_fpn", "fp16", "2")]
    assert ratios == ["2.00", "3.00"]
    assert "- left out for want of time: the largest batch" in text
    assert text.endswith("## What failed\n\n- step m2det: batch 512: memory\n")
    assert "Tiny" not in text
