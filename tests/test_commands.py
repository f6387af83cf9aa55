"""Every shell command in a document: its programs and flags exist, and it runs as it is written.

Commands run in a clone of this checkout on a small sample set, cut short by flags that are added at
their ends. A block that cannot run here has a comment before it, which a reader does not see:
`<!-- not run: REASON -->`. Of its commands, the programs and flags are checked all the same.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from common.coco.sample import write_sample
from tests.scripts import ROOT
from tests.shell_blocks import Block, blocks_of, commands_of, words_of

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
MODEL_PAGES = [
    "ssd_mmdet/README.md",
    "ssd_resnet34/README.md",
    "ssd_resnet34/tfrecord/README.md",
    "m2det/README.md",
    "fcos/README.md",
]
# These have no parser of argparse's; their flags stand in their text.
SCRIPTS_WITH_FLAGS = ("download_dataset.sh", "download_weights.sh", "run_tests.sh", "gpu.sh")
ACTIVATE = "source .venv/bin/activate"
INTERPRETERS = ("python3", "python", ".venv/bin/python")

# What is added at the end of a command, so that it takes seconds.
SHORT_TRAINING = "--max_iters=1 --batch_size=2 --num_workers=0 --device=cpu"
SHORT_PROFILE = "--profile=1"
SHORT_SWEEP = "--max_iters=4"
SHORT_PARTS = "--batch_size=4 --accumulate=2"
NOT_TRAINING = ("--help", "--check_data", "--look", "--version", "--replay")
SHORT_TESTS = "tests/common/test_files.py"


def pages_with_commands() -> list[str]:
    pages = [*PAGES, *MODEL_PAGES]
    return [page for page in pages if any(is_shell(block) for block in blocks_of(ROOT / page))]


def is_shell(block: Block) -> bool:
    return block.language == "bash"


def program_of(words: list[str], folder: Path) -> tuple[Path | None, list[str]]:
    """Return the program of this repository that a command starts, and the words after it."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):  # variables
        words = words[1:]
    if not words or words[0] not in (*INTERPRETERS, "bash"):
        return None, []
    if words[1:2] == ["-m"] and words[0] != "bash":
        parts = words[2].split(".")
        file = ROOT.joinpath(*parts).with_suffix(".py")
        return (file, words[3:]) if parts[0] not in ("venv", "pip", "uv") else (None, [])
    if words[1].endswith((".py", ".sh")):
        return folder / words[1], words[2:]
    return None, []


@functools.cache
def known_flags(program: Path) -> frozenset[str]:
    """Return the flags of a program, with underscores."""
    if program.name in SCRIPTS_WITH_FLAGS:
        return flags_in(program.read_text())
    if program.suffix == ".sh":
        return flags_of_script(program)
    module = importlib.import_module(".".join(program.relative_to(ROOT).with_suffix("").parts))
    words = ["export", "--help"] if program.name == "weights.py" else ["--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        module.main(words)
    return flags_in(output.getvalue())


def flags_of_script(script: Path) -> frozenset[str]:
    """Return the flags of a launch script: those of all of them, and of the program it starts."""
    text = script.read_text()
    launcher = (ROOT / "common/npu/launch.sh").read_text()
    started = re.search(r"[\w/]+\.py", re.sub(r"#.*", "", text))
    program = {"run_npu_1p.sh": "ssd_main.py", "run_npu_8p.sh": "ssd_main.py"}.get(script.name)
    if program is None:
        program = started[0]
    folder = script.parent
    while not (folder / program).exists():
        folder = folder.parent
    return flags_in(launcher) | known_flags(folder / program)


def flags_in(text: str) -> frozenset[str]:
    return frozenset(
        flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text)
    )


@pytest.mark.parametrize("page", pages_with_commands())
def test_programs_and_flags_of_a_document_exist(page):
    folder = (ROOT / page).parent
    if folder.name in ("docs", "tfrecord"):  # where their commands start from
        folder = folder.parent
    wrong = []
    checked = 0
    for block in filter(is_shell, blocks_of(ROOT / page)):
        for command in commands_of(block):
            program, words = program_of(words_of(command), folder)
            if program is None:
                continue
            if not program.exists():
                program = ROOT / program.relative_to(folder)
            checked += 1
            if not program.exists():
                wrong.append(f"line {block.line}: there is no {program.relative_to(ROOT)}")
                continue
            flags = [word.partition("=")[0] for word in words if re.match("--?[a-zA-Z]", word)]
            for flag in flags:
                if flag.replace("-", "_") not in known_flags(program):
                    wrong.append(f"line {block.line}: {program.name} has no flag {flag}")
    assert not wrong, "\n".join(wrong)
    assert checked or page in ("docs/data.md",)


def cut_short(command: str) -> str:
    """Return a command that does the same in seconds."""
    words = words_of(command)
    program, _ = program_of(words, ROOT)
    if program is None:
        return command
    name = program.name
    if name == "run_tests.sh":
        return f"{command} {SHORT_TESTS}"
    if name == "selfcheck.py":
        return f"{command} --model=ssd_resnet34 --device=cpu"
    if any(word.partition("=")[0] in NOT_TRAINING for word in words):
        return command
    trains = name in ("train.py", "quickstart.sh") or name.startswith("train_")
    if not trains or name.startswith("train_eval"):
        return command
    added = SHORT_TRAINING
    if any(word.startswith("--profile") for word in words):
        added = f"{SHORT_TRAINING} {SHORT_PROFILE}"
    if "--find_lr" in words:
        added = f"{added} {SHORT_SWEEP}"
    if any(word.startswith("--accumulate") for word in words):
        added = f"{added} {SHORT_PARTS}"
    if program.parent.name == "m2det":
        added = f"{added} --recipe=quickstart"
    if name.endswith("8p.sh"):
        added = f"{added} --nproc_per_node=2"
    return f"{command} {added}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clean clone, with the data, the weights and the checkpoint that documents speak of."""
    folder = tmp_path_factory.mktemp("clone") / "onestage"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("quickstart/sample", "coco", "DIR"):
        write_sample(folder / name, train=8, val=3)
    (folder / "weights").mkdir()
    weights = torchvision.models.resnet34(weights=None).state_dict()
    torch.save(weights, folder / "weights/resnet34-333f7ec4.pth")
    picture = sorted((folder / "coco/val2017").iterdir())[0]
    (folder / "IMAGE").symlink_to(picture)
    (folder / "FOLDER").symlink_to(picture.parent)
    shell(folder, cut_short("bash quickstart.sh"))
    (folder / "FILE").symlink_to(folder / "quickstart/output/best.pt")
    (folder / "RUN").symlink_to(folder / "quickstart/output")
    return folder


def give_best_scores(folder: Path) -> None:
    """Put a score with the best F1 where there is none: after one step no detection is right."""
    metrics = folder / "quickstart/output/metrics.json"
    metrics.write_text(metrics.read_text().replace('"score": -1.0', '"score": 0.3'))


def shell(folder: Path, text: str) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["TEST_PROCESSES"] = "1"
    program = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


def pages_that_run() -> list[str]:
    return [
        page
        for page in PAGES
        if any(is_shell(block) and not block.reason for block in blocks_of(ROOT / page))
    ]


@pytest.mark.slow
@pytest.mark.again  # each program has tests of its own
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", pages_that_run())
def test_the_commands_of_a_page_run_in_order(clone, page):
    # The README says itself that the environment has to be active, and the other pages follow it.
    before = "" if page == "README.md" else f"{ACTIVATE}\n"
    give_best_scores(clone)  # the page before may have run quickstart.sh
    for block in blocks_of(ROOT / page):
        if block.reason:
            continue
        if is_shell(block):
            for command in commands_of(block):
                print(cut_short(command), flush=True)
                shell(clone, before + cut_short(command))
                if command == ACTIVATE:
                    before = f"{ACTIVATE}\n"
        elif block.language == "python" and page == "README.md":
            (clone / "program.py").write_text(block.text)
            shell(clone, f"{before}python3 program.py")
            assert (clone / "found.jpg").stat().st_size > 0
