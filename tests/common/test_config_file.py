"""The flags of a file, and the file that a run leaves to be repeated."""

import json
import sys

import pytest

from common import flags
from common.config_file import flags_of_config
from common.errors import UserError
from tests.common.test_flags import RECIPES


def parse(*words):
    parser = flags.make_parser("Train.", *flags.TRAINING_GROUPS, recipes=RECIPES)
    return parser.parse_args(list(words))


def config(tmp_path, content):
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(content))
    return f"--config={path}"


def test_flags_of_a_file_are_those_of_a_command_line(tmp_path):
    content = {
        "data": "a b/c,d",
        "batch_size": 4,
        "lr": 1e-05,
        "steps": [3, 5],
        "sides": ["1,2", "3"],
        "none_yet": [],
        "augment": False,
        "save": True,
        "num-workers": -1,
        "work_dir": "runs",  # of the old programs
    }
    args = parse(config(tmp_path, content), "--lr=0.5")
    recipe = flags.chosen_recipe(args, RECIPES)
    assert (args.data, args.save, args.num_workers) == ("a b/c,d", True, -1)
    assert str(args.output_dir) == "runs"
    assert (recipe.batch_size, recipe.lr, recipe.steps) == (4, 0.5, (3, 5))
    assert (recipe.sides, recipe.none_yet, recipe.augment) == (("1,2", "3"), (), False)
    assert args.given["steps"] == [3, 5]
    assert args.given["lr"] == 0.5
    assert not {"config", "momentum", "seed"} & args.given.keys()


def test_flags_of_a_file_are_checked_like_others(tmp_path, capsys):
    for content, line in (
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"colour": 1}, "flags.json: there is no flag colour"),
        ({"device": "tpu"}, "argument --device: invalid choice: 'tpu'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse(config(tmp_path, content))
        assert line in capsys.readouterr().err


def test_a_file_of_flags_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json cannot be read: No such file .*run\.json"):
        parse("--config", str(path))
    path.write_bytes(b"\x80")
    with pytest.raises(UserError, match="cannot be read: it is no text"):
        parse("--config", str(path))
    for text, problem in (
        ("{", "is not JSON"),
        ("[]", "not an object of flags"),
        ('{"lr": null}', "lr is null"),
        ('{"lr": {"a": 1}}', "lr is {"),
        ('{"steps": [[1]]}', r"steps is \[1\]"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=problem):
            parse("--config", str(path))


def test_yaml_needs_its_package(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 0.5\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match="pip install pyyaml, or write JSON"):
        flags_of_config(str(path))


def test_a_file_of_mmdetection_is_answered(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--config", "ssd300_coco.py")
    assert "ssd300_coco.py: no config file is read" in capsys.readouterr().err
