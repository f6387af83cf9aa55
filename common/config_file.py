"""The file of `--config`: flags by their names, in JSON, or in YAML where pyyaml is installed.

    {"data": "coco", "lr": 0.01, "lr_decay_epochs": [8, 11], "augment": false}

A run's `run.json` is such a file as well: its flags are one entry of it. This module needs the
standard library only.
"""

import json
from pathlib import Path

from common.errors import UserError

FLAGS_ENTRY = "flags"  # of run.json, which has much else
YAML_SUFFIXES = (".yaml", ".yml")
REMEDY = "give the run.json of a run, or a JSON file of flags"


def flags_of_config(path: str) -> dict[str, object]:
    """Return the flags of a file by their names as it has them.

    Raise UserError where it cannot be read or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"--config {path} cannot be read: {reason}", REMEDY) from None
    content = _parse_yaml(path, text) if path.endswith(YAML_SUFFIXES) else _parse_json(path, text)
    if isinstance(content, dict) and isinstance(content.get(FLAGS_ENTRY), dict):
        content = content[FLAGS_ENTRY]
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path}: not an object of flags", 'write {"data": "coco", "lr": 0.01}'
        )
    return content


def words_of_flag(path: str, name: str, value: object) -> list[str]:
    """Return a flag of a file as the words of a command line.

    Raise UserError for a value that no flag has.
    """
    flag = "--" + name.lstrip("-").replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, list):
        return [flag, *(_text(path, name, element) for element in value)]
    return [f"{flag}={_text(path, name, value)}"]


def _text(path: str, name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(
            f"--config {path}: {name} is {json.dumps(value)}",
            "give a number, a text, true, false or a list of numbers or texts",
        )
    return str(value)


def _parse_json(path: str, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"--config {path} is not JSON: {error}") from None


def _parse_yaml(path: str, text: str) -> object:
    try:
        import yaml
    except ImportError:
        raise UserError(
            f"--config {path}: YAML needs the package pyyaml", "pip install pyyaml, or write JSON"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not YAML: {reason}") from None
