"""The programs and launch scripts of ssd_resnet34 on simulated NPUs, several ranks among them."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import scripts
from tests.scripts import assert_same_state, losses, subset

pytestmark = pytest.mark.npu_sim

AS_NPU = Path(__file__).parents[1] / "as_npu.py"
SMALL = ("--backbone=resnet10", "--batch_size=2", "--threshold=0", "--num_workers=0")
TWO_EPOCHS = ("--epochs=2", "--log_interval=1", "--save_interval=2", "--keep=9", "--amp=O0")


def on_cpu(script: str, *flags, ranks: int = 1) -> None:
    """Run to the end on the CPU, in the NPU path's way, where torch_npu does not even load."""
    words = scripts.command(script, "--device=cpu", *flags, ranks=ranks)
    words.insert(words.index(str(scripts.MODEL / script)), str(AS_NPU))
    done = subprocess.run(words, env=without_cann(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def without_cann() -> dict[str, str]:
    return {k: v for k, v in scripts.environment().items() if k != "LD_LIBRARY_PATH"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("coco") / "coco", train=8, val=4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Four steps with evaluation, on two NPUs."""
    output = tmp_path_factory.mktemp("npu") / "run"
    flags = (*SMALL, *TWO_EPOCHS, f"--data={data}", f"--output_dir={output}", "--device=npu")
    scripts.run("train.py", *flags, ranks=2)
    return output


def detections(output: Path) -> list[dict]:
    return json.loads((output / "results.bbox.json").read_text())


def test_two_ranks_over_hccl_equal_two_over_gloo(trained, data, tmp_path):
    output = tmp_path / "run"
    flags = (*SMALL, *TWO_EPOCHS, f"--data={data}", f"--output_dir={output}")
    on_cpu("train.py", *flags, ranks=2)
    assert list(losses(trained)) == [1, 2, 3, 4]
    assert losses(trained) == losses(output)
    assert_same_state(trained / "iter_4.pt", output / "iter_4.pt")
    assert detections(trained) == detections(output)
    assert detections(trained)


def test_a_resumed_run_equals_an_uninterrupted_one(trained, data, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(trained / "iter_2.pt", output)
    flags = (*SMALL, *TWO_EPOCHS, f"--data={data}", f"--output_dir={output}", "--device=npu")
    scripts.run("train.py", *flags, "--resume=auto", ranks=2)
    assert list(losses(output)) == [3, 4]
    assert_same_state(trained / "iter_4.pt", output / "iter_4.pt")


def test_a_checkpoint_of_the_npu_is_evaluated_without_torch_npu(trained, data, tmp_path):
    flags = (*SMALL[:1], f"--data={data}", f"--checkpoint_path={trained / 'iter_4.pt'}")
    scripts.run("evaluate.py", *flags, f"--output_dir={tmp_path / 'npu'}", "--device=npu")
    on_cpu("evaluate.py", *flags, f"--output_dir={tmp_path / 'cpu'}")
    assert detections(tmp_path / "npu") == detections(tmp_path / "cpu")
    assert detections(tmp_path / "npu") == detections(trained)


def test_kill_9_of_a_rank_ends_the_other_with_a_message(data, tmp_path):
    output = tmp_path / "run"
    flags = (*SMALL, "--amp=O0", f"--data={data}", f"--output_dir={output}", "--device=npu")
    run = ("--epochs=100", "--log_interval=1", "--save_interval=2", "--kind=perf", "--timeout=20")
    # Without the launcher, which would end the other at once: as on another node.
    port, ranks = scripts.free_port(), []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                scripts.command("train.py", *flags, *run),
                env=scripts.environment() | {name: str(value) for name, value in place.items()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        scripts.wait_for_step(output, 3, ranks[0])
        ranks[1].send_signal(signal.SIGKILL)
        error = ranks[0].communicate(timeout=60)[1]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 1
    line = error.strip().splitlines()[-1]
    assert re.match(r"error \(rank 0\): .*another rank.*--resume=auto", line), error
    assert "Traceback" not in error
    # What is left goes on, here on one device with the same global batch.
    done = max(scripts.checkpoints(output))
    resume = ("--resume=auto", "--batch_size=4", f"--max_iters={done + 1}")
    scripts.run("train.py", *flags, *run, *resume)
    assert max(scripts.checkpoints(output)) == done + 1


def test_910a(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMULATED_NPU_SOC", "Ascend910A")
    flags = (*SMALL, f"--data={data}", f"--output_dir={tmp_path / 'run'}", "--device=npu")
    for refused, words in (
        ("--amp_dtype=bf16", "--amp_dtype bf16: of no use on this npu"),
        ("--loss_scale=dynamic", "--loss_scale dynamic: this NPU hides overflows"),
    ):
        done = scripts.run("train.py", *flags, "--amp=O1", refused, status=1)
        assert done.stderr.strip().splitlines()[-1].startswith(f"error: {words}")
    run = ("--max_iters=2", "--log_interval=1", "--kind=perf")
    scripts.run("train.py", *flags, *run, "--amp=O1", "--loss_scale=128")
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_without_cann_the_remedy_is_named(data, tmp_path):
    flags = (f"--data={data}", f"--output_dir={tmp_path / 'run'}", "--device=npu")
    words = scripts.command("train.py", *flags)
    done = subprocess.run(words, env=without_cann(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: --device npu: torch_npu does not load .*set_env\.sh", line)


def test_without_cann_auto_goes_on_with_the_cpu():
    program = "import common; from common.npu.device import setup_device; print(*setup_device())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=without_cann(),
        cwd=scripts.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("cpu device: cpu")
    assert "npu: torch_npu does not load" in done.stdout


def launch(script: str, data: Path, output: Path, *flags) -> dict[str, str]:
    """Run a launch script; what its summary file says."""
    where = (f"--data_path={data}", f"--output_dir={output}")
    done = scripts.run(script, *where, *SMALL, "--log_interval=1", *flags, timeout=400)
    assert re.search(r"device: npu:0 Ascend910B3", done.stdout + done.stderr)
    text = next(output.glob("*_bs*_*.log")).read_text()
    return dict(line.split(" = ") for line in text.splitlines())


def test_the_launch_script_of_one_device(data, tmp_path):
    summary = launch("train_performance_1p.sh", data, tmp_path / "run", "--max_iters=3")
    assert float(summary["ActualFPS"]) > 0
    assert summary["CaseName"].endswith("_bs2_1p_perf")


def test_the_launch_script_of_eight_devices(data, tmp_path):
    flags = ("--max_iters=2", "--batch_size=1", "--epochs=2")
    summary = launch("train_full_8p.sh", data, tmp_path / "run", *flags)
    assert float(summary["ActualFPS"]) > 0
    assert float(summary["TrainAccuracy"]) >= 0
    assert summary["CaseName"].endswith("_bs1_8p_acc")
    assert list(losses(tmp_path / "run")) == [1, 2]
