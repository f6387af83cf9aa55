"""`run.json` in the output folder of a run: what it was, so that it can be repeated.

`train.py --config=run.json` starts the run again with the flags that are written there, in any
folder, because their paths are absolute. `common/config_file.py` reads them.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from glob import escape, glob
from pathlib import Path

from common.config_file import FLAGS_ENTRY
from common.files import encoded, write_atomically

RUN_FILE = "run.json"
TIME_STAMP = "_%Y%m%d_%H%M%S"  # of its last change, in the name of a former one
ROOT = Path(__file__).resolve().parents[2]  # the folder that `common` is in
RUNNING = "running"  # the result until there is another one; of a killed process it stays
FINISHED = "finished"
STOPPED = "stopped"  # by a signal, with a checkpoint
NUMBERS_ON_LINES = re.compile(r"\[\n[\s\d.,eE+-]+\]")
GIT_SECONDS = 10
READ_AT_ONCE = 1 << 20  # bytes
# The flags that name files and folders, besides those in `flags.INPUTS`.
OUTPUT_FLAGS = ("output_dir", "model_dir")
FLAGS_OF_START_WEIGHTS = ("checkpoint", "pretrained", "resnet_checkpoint")
WEIGHTS_FLAGS = (*FLAGS_OF_START_WEIGHTS, "resume")
WORDS_OF_RESUME = ("none", "auto")  # which are no files


class RunRecord:
    """Writes `run.json`: at the start of a run what it is, at its end how it went.

    `content` is what is known at the start. Only the main rank has one.
    """

    def __init__(self, folder: Path, content: Mapping[str, object]):
        self.path = folder / RUN_FILE
        self.content = {
            "result": RUNNING,
            "started": _now(),
            "ended": None,
            "steps": None,
            "best_AP": None,
            **content,
        }

    def begin(self) -> None:
        """Write the file; that of an earlier process of the same run is renamed with its time.

        Raise UserError where it cannot be written.
        """
        if self.path.exists():
            earlier = datetime.fromtimestamp(self.path.stat().st_mtime)
            self.path.rename(self.path.with_name(f"run{earlier:{TIME_STAMP}}.json"))
        self._write()

    def end(self, result: str, steps: int, best_ap: float) -> None:
        """Write how the run ended, after how many steps, and its best AP (below 0: none)."""
        self.content.update(result=result, ended=_now(), steps=steps)
        if best_ap >= 0:
            self.content["best_AP"] = best_ap
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.content, indent=2)
        # A list of numbers stays on its line. No text of JSON's has a line break.
        text = NUMBERS_ON_LINES.sub(lambda numbers: " ".join(numbers[0].split()), text)
        write_atomically(self.path, encoded(text + "\n"))


def read_record(path: Path | str) -> dict | None:
    """Return the content of a `run.json`, None of a file that is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return None
    if isinstance(content, dict) and FLAGS_ENTRY in content:
        return content
    return None


def repeatable_flags(given: Mapping[str, object], inputs: Iterable[str]) -> dict[str, object]:
    """Return flags, by their names, so that they mean the same in any folder and fit a JSON file.

    `inputs` are the names of those that name data.
    """
    of_paths = {*inputs, *OUTPUT_FLAGS, *WEIGHTS_FLAGS}
    flags = {}
    for name, value in given.items():
        is_file = not (name == "resume" and value in WORDS_OF_RESUME)
        if name in of_paths and is_file and str(value):
            value = os.path.abspath(value)
        flags[name] = str(value) if isinstance(value, Path) else value
    return flags


def describe_files(paths: Iterable[str]) -> list[dict[str, str]]:
    """Return the absolute paths of data, each once, of JSON files with their SHA-256."""
    described = {}
    for path in paths:
        absolute = os.path.abspath(path)
        described[absolute] = {"path": absolute}
        if absolute.endswith(".json") and os.path.isfile(absolute):
            described[absolute]["sha256"] = sha256(absolute)
    return list(described.values())


def describe_weights(paths: Iterable[str]) -> list[dict[str, str]]:
    """Return absolute paths of weights, of files with their SHA-256.

    A path that is no file may be the beginning of the names of a TensorFlow checkpoint's files.
    """
    described = []
    for path in paths:
        files = [path] if os.path.isfile(path) else sorted(glob(f"{escape(path)}.*"))
        if not files:
            described.append({"path": path})
        for file in files:
            described.append({"path": file, "sha256": sha256(file)})
    return described


def sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(partial(file.read, READ_AT_ONCE), b""):
            digest.update(block)
    return digest.hexdigest()


def commit() -> str | None:
    """Return the commit of this repository, with "-dirty" where files are changed.

    None where it is no checkout of git's or there is no git.
    """
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def differences(record: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return in what a run differs from the one whose record it repeats, a line each.

    Compared are the ranks, the numbers of the recipe, and the annotation files and weights of the
    same paths.
    """
    lines = []
    before = {"ranks": record.get("ranks"), **record.get("recipe", {})}
    # As JSON has them: a tuple is a list there.
    today = json.loads(json.dumps({"ranks": now["ranks"], **now["recipe"]}))
    for name, value in today.items():
        if name in before and before[name] != value:
            lines.append(f"{name} is {value}; it was {before[name]}")
    files_before = [*record.get("data", []), *record.get("weights", [])]
    hashes = {file["path"]: file.get("sha256") for file in files_before}
    for file in [*now["data"], *now["weights"]]:
        if "sha256" in file and hashes.get(file["path"], file["sha256"]) != file["sha256"]:
            lines.append(f"{file['path']} has another content than it had")
    return lines


def recipe_as_json(recipe) -> dict[str, object]:
    """Return the numbers of a recipe by their names, with lists for tuples.

    Infinity, for which JSON has no number, is a text.
    """
    return json.loads(json.dumps(dataclasses.asdict(recipe)), parse_constant=str)


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
