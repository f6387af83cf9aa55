"""What befalls a run on simulated NPUs: lost ranks, a 910A, no CANN, eight devices."""

import re
import signal
import subprocess
import sys

import pytest

from tests import scripts
from tests.scripts import losses, subset
from tests.simulated_npu.programs import launch, without_cann

pytestmark = pytest.mark.npu_sim

SMALL = ("--backbone=resnet10", "--batch_size=2", "--threshold=0", "--num_workers=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return subset(tmp_path_factory.mktemp("coco") / "coco", train=8, val=4)


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
        more = ("--amp=O1", refused)
        done = scripts.run("train.py", *flags, *more, status=1, own_process=True)
        assert done.stderr.strip().splitlines()[-1].startswith(f"error: {words}")
    run = ("--max_iters=2", "--log_interval=1", "--kind=perf")
    half = ("--amp=O1", "--loss_scale=128")
    scripts.run("train.py", *flags, *run, *half, own_process=True)
    assert list(losses(tmp_path / "run")) == [1, 2]
    assert "a number was too large" not in (tmp_path / "run/train_0.log").read_text()
    scripts.run("train.py", *flags, *run, "--loss_scale=1000000000", "--amp=O0", own_process=True)
    assert "a number was too large" in (tmp_path / "run/train_0.log").read_text()


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


@pytest.mark.again
def test_the_launch_script_of_eight_devices(data, tmp_path):
    flags = ("--max_iters=2", "--batch_size=1", "--epochs=2")
    script = scripts.MODEL / "test/train_full_8p.sh"
    summary = launch(script, data, tmp_path / "run", *SMALL, "--log_interval=1", *flags)
    assert float(summary["ActualFPS"]) > 0
    assert float(summary["TrainAccuracy"]) >= 0
    assert summary["CaseName"].endswith("_bs1_8p_acc")
    assert list(losses(tmp_path / "run")) == [1, 2]
