"""Running a program of any model on simulated NPUs, and on the CPU in the NPU path's way."""

import json
import subprocess
import sys
from pathlib import Path

from common.npu.device import obstacle_to_fused_sgd, setup_device
from tests import scripts

AS_NPU = Path(__file__).parent / "as_npu.py"


def on_cpu(program: Path, *flags, ranks: int = 1) -> None:
    """Run to the end on the CPU, in the NPU path's way, where torch_npu does not even load."""
    launcher = []
    if ranks > 1:  # by torchrun itself: our launcher starts only the programs
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        launcher.append(f"--master_port={scripts.free_port()}")
    npu, _ = setup_device("npu")
    sgd = "fused" if obstacle_to_fused_sgd(npu) is None else "lists"
    words = [sys.executable, *launcher, str(AS_NPU), sgd, str(program), "--device=cpu"]
    words += [str(flag) for flag in flags]
    done = subprocess.run(words, env=without_cann(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def without_cann() -> dict[str, str]:
    return {k: v for k, v in scripts.environment().items() if k != "LD_LIBRARY_PATH"}


def launch(script: Path, data: Path, output: Path, *flags) -> dict[str, str]:
    """Run a launch script, which takes the NPUs by itself; what its summary file says."""
    where = (f"--data_path={data}", f"--output_dir={output}")
    done = scripts.run(str(script), *where, *flags, timeout=400)
    assert "device: npu:0 Ascend910B3" in done.stdout + done.stderr
    (path,) = output.glob("*_bs*_*.log")
    return dict(line.split(" = ") for line in path.read_text().splitlines())


def assert_same_detections(one: Path, other: Path) -> None:
    """Two output folders hold the same results, and some; equal scores come in either order."""

    def results(folder):
        rows = json.loads((folder / "results.bbox.json").read_text())
        return sorted(rows, key=lambda row: (row["image_id"], -row["score"], row["bbox"]))

    first, second = results(one), results(other)
    different = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
    assert first
    assert not different, different[:3]
