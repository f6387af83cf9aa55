"""Starting the real scripts on small real data, for the end-to-end tests."""

import importlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

import torch

from common.npu import entry

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "ssd_resnet34"
TINY = ROOT / "tests" / "data" / "tiny_coco"
# A small network and few images: a step takes a fraction of a second.
SMALL = ("--backbone=resnet10", "--batch_size=2", "--device=cpu", "--amp=O0", "--threshold=0")


def subset(folder: Path, train: int = 10, val: int = 4, classes: list[str] | None = None) -> Path:
    """A COCO folder with the first annotated images of tiny_coco (linked, not copied).

    `classes`: names to use in turn instead of the 80 of COCO.
    """
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        name = f"annotations/instances_{split}2017.json"
        content = json.loads((TINY / name).read_text())
        annotated = {a["image_id"] for a in content["annotations"]}
        images = [i for i in content["images"] if i["id"] in annotated][:count]
        ids = {image["id"] for image in images}
        content["images"] = images
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        if classes:
            content["categories"] = [{"id": 7 * k, "name": n} for k, n in enumerate(classes)]
            for annotation in content["annotations"]:
                annotation["category_id"] = annotation["category_id"] % len(classes) * 7
        (folder / name).write_text(json.dumps(content))
        (folder / f"{split}2017").mkdir()
        for image in images:
            link = folder / f"{split}2017" / image["file_name"]
            link.symlink_to(TINY / f"{split}2017" / image["file_name"])
    return folder


def cut_short(data: Path, record: int) -> Path:
    """Replace a training image, by its position in the annotation file, by its first half."""
    content = json.loads((data / "annotations/instances_train2017.json").read_text())
    path = data / "train2017" / content["images"][record]["file_name"]
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def command(script: str, *flags, ranks: int = 1) -> list[str]:
    """The command line of a program, `.py` through the launcher where there are several ranks."""
    if script.endswith(".sh"):
        return ["bash", str(MODEL / "test" / script), *map(str, flags)]
    launcher = []
    if ranks > 1:
        launcher = [str(ROOT / "common" / "npu" / "launch.py"), f"--nproc_per_node={ranks}"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [sys.executable, *launcher, str(MODEL / script), *map(str, flags)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def run(
    script: str,
    *flags,
    ranks: int = 1,
    status: int | None = 0,
    timeout: int = 600,
    own_process: bool = False,
):
    """Run to the end; the finished process with `stdout` and `stderr` as text.

    A Python program of one rank runs in this process, which saves the seconds of its start, unless
    it needs its `own_process`.
    """
    if script.endswith(".py") and ranks == 1 and not own_process:
        done = run_here(script, *flags)
    else:
        done = subprocess.run(
            command(script, *flags, ranks=ranks),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    assert status is None or done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def run_here(script: str, *flags) -> subprocess.CompletedProcess:
    """Run the `main` of a program in this process, and leave the process as it was."""
    program = (MODEL / script).relative_to(ROOT).with_suffix("")
    main = importlib.import_module(".".join(program.parts)).main
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    output, errors = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            entry.run(lambda: main(list(map(str, flags))))
    except SystemExit as ended:
        status = ended.code
    finally:
        torch.use_deterministic_algorithms(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if isinstance(status, str):  # as the interpreter does at its end
        errors.write(f"{status}\n")
        status = 1
    return subprocess.CompletedProcess(
        [script, *flags], status or 0, output.getvalue(), errors.getvalue()
    )


@contextmanager
def running(
    script: str,
    *flags,
    ranks: int = 1,
    stdout: int = subprocess.DEVNULL,
    stderr: int | TextIO = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen]:
    """Started in a process group of its own, never left behind; the run log keeps its output."""
    process = subprocess.Popen(
        command(script, *flags, ranks=ranks),
        env=environment(),
        start_new_session=True,
        stdout=stdout,
        stderr=stderr,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            signal_all(process, signal.SIGKILL)


def wait_for_step(output: Path, step: int, process: subprocess.Popen, seconds: float = 240) -> None:
    """Until the run has logged `step` (1-based); fails when it ends before."""

    def logged() -> bool:
        return any(line["step"] >= step for line in train_lines(output))

    wait_until(logged, output, process, seconds)


def wait_for_text(output: Path, text: str, process: subprocess.Popen) -> None:
    """Until the run has logged `text`; fails when it ends before."""
    log = output / "train_0.log"
    wait_until(lambda: log.exists() and text in log.read_text(), output, process)


def wait_until(
    condition: Callable[[], bool], output: Path, process: subprocess.Popen, seconds: float = 240
) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, (output / "train_0.log").read_text()[-3000:]
        assert time.monotonic() < limit, f"waited for {seconds} s"
        time.sleep(0.05)


def signal_group(process: subprocess.Popen, number: int) -> int:
    """Signal the process group, as a terminal does; the exit status.

    The launcher's ranks are sessions of their own: they get what the launcher sends them.
    """
    everyone = family(process.pid)
    os.killpg(process.pid, number)
    return ended(process, everyone)


def signal_all(process: subprocess.Popen, number: int) -> int:
    """Signal launcher, ranks and loader workers, as a machine that goes down; the exit status."""
    everyone = family(process.pid)
    for pid in everyone:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return ended(process, everyone)


def ended(process: subprocess.Popen, everyone: list[int], seconds: float = 90) -> int:
    """Wait for all of `everyone` to end: none may go on writing; the exit status of `process`."""
    status = process.wait(seconds)
    limit = time.monotonic() + seconds
    while alive := [pid for pid in everyone if parent(pid) is not None]:
        assert time.monotonic() < limit, f"still running: {alive}"
        time.sleep(0.05)
    return status


def parent(pid: int) -> int | None:
    """The parent of a process, None of one that has ended."""
    try:
        state, above = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(above)


def children(pid: int) -> list[int]:
    """Child processes, oldest first."""
    running = sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [other for other in running if parent(other) == pid]


def family(pid: int) -> list[int]:
    """A process and all below it."""
    return [pid, *(one for child in children(pid) for one in family(child))]


def json_lines(output: Path) -> list[dict]:
    """What all starts of a run have logged."""
    lines = []
    for path in sorted(output.glob("*.log.json")):
        for text in path.read_text().splitlines():
            with suppress(ValueError):  # being written at this moment
                lines.append(json.loads(text))
    return lines


def train_lines(output: Path) -> list[dict]:
    """The train lines of a run, of repeated steps the last one, in order."""
    lines = {line["step"]: line for line in json_lines(output) if line.get("mode") == "train"}
    return [lines[step] for step in sorted(lines)]


def losses(output: Path) -> dict[int, tuple]:
    names = ("loss_cls", "loss_bbox", "loss", "lr")
    return {line["step"]: tuple(line[name] for name in names) for line in train_lines(output)}


def checkpoints(output: Path) -> list[int]:
    return sorted(int(re.search(r"\d+", path.name)[0]) for path in output.glob("iter_*.pt"))


def tensors(value, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, (list, tuple)) else items
    found = {}
    for key, part in items:
        found |= tensors(part, f"{name}.{key}")
    return found


def assert_same_state(one: Path, other: Path) -> None:
    """Two checkpoints hold the same bits: weights, momenta, running statistics of all ranks."""
    states = [torch.load(path, weights_only=True) for path in (one, other)]
    first, second = map(tensors, states)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different[:5]
    assert states[0]["iteration"] == states[1]["iteration"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
