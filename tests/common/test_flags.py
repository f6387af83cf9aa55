import argparse
import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from common import flags
from common.errors import UserError
from common.npu import checkpoint
from common.npu.distributed import Ranks


def option(default, *flags):
    return field(default=default, metadata={"help": f"about {default}", "flags": flags})


@dataclass(frozen=True)
class Recipe:
    name: str = option("net")
    batch_size: int = option(32, "-b")
    lr: float = option(1e-3)
    weight_decay: float = option(5e-4, "--wd")
    steps: tuple[int, ...] = option((4, 8))
    scales: tuple[float, ...] = option((0.5, 1.0))
    none_yet: tuple[int, ...] = option(())
    sides: tuple[str, ...] = option(("1,2",))
    augment: bool = option(True)
    epochs: int = option(9)
    eval_batch_size: int = option(5)
    hidden: int = 7


RECIPES = {"small": Recipe(), "large": Recipe(batch_size=64, augment=False)}


def parser():
    return flags.make_parser("Train.", *flags.TRAINING_GROUPS, recipes=RECIPES)


def recipe_of(*words):
    return flags.chosen_recipe(parser().parse_args(list(words)), RECIPES)


@pytest.mark.parametrize(
    "words",
    [
        ["--weight-decay", "0.25", "--data-path=/a_b/c_d", "--max-iters=3"],
        ["--weight_decay", "0.25", "--data_path=/a_b/c_d", "--max_iters=3"],
        ["--wd=0.25", "-d", "/a_b/c_d", "--max-iters", "3"],
        ["--wd=0.25", "--data", "/a_b/c_d", "--max-iters=3"],
    ],
)
def test_dash_and_underscore_are_the_same_in_names_only(words):
    args = parser().parse_args(words)
    assert (args.data, args.max_iters, args.weight_decay) == ("/a_b/c_d", 3, 0.25)


@pytest.mark.parametrize("words", [["--device=npu:3"], ["--device", "npu:3", "--data=/a:3"]])
def test_a_device_may_have_its_index(words):
    args = parser().parse_args(words)
    assert (args.device, args.device_id) == ("npu", 3)


def test_only_a_device_has_an_index():
    args = parser().parse_args(["--tag", "cuda:1", "--data=npu:2"])
    assert (args.tag, args.data, args.device_id) == ("cuda:1", "npu:2", 0)


@pytest.mark.parametrize("words", [["--lr=inf"], ["--seed=99999999999999999999"], ["--wd=nan"]])
def test_numbers_without_sense(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words)
    assert ended.value.code == 2
    assert "must be at least 0 and below " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--look", "--replay", "--profile"])
def test_what_is_off_by_default_is_not_switched_off_by_0(flag, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args([f"{flag}=0"])
    assert f"{flag} 0: must be at least 1" in capsys.readouterr().err
    parser().parse_args([])


def test_the_command_line_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--save_interval", "5"])
    assert parser().parse_args().save_interval == 5


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learning_rat", "3"], "--learning-rat"),
        (["--batch", "3"], "--batch"),  # no abbreviations
        (["--batch_size", "many"], "--batch-size"),
        (["--device", "tpu"], "--device"),
        (["--recipe", "huge"], "--recipe"),
        (["--lr"], "--lr"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(words, named, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--batch-size", "(default: 32)", "(default: (4, 8))", "--no-augment", "--resume"):
        assert words in text
    for flag in flags.FLAGS:
        assert all(name in text for name in flag.names.split())
        assert flag.help in text
    assert "hidden" not in text


def help_of(capsys, *words, documentation="Train."):
    p = flags.make_parser(documentation, *flags.TRAINING_GROUPS, recipes=RECIPES)
    with pytest.raises(SystemExit, match="0"):
        p.parse_args(list(words))
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [["--recipe", "large", "--help"], ["-h", "--recipe=large"]])
def test_help_shows_the_defaults_of_the_preset_that_is_named(words, capsys):
    text = " ".join(help_of(capsys, *words).split())
    assert "about 32, or auto: the largest number that fits the device (default: 64)" in text
    assert "about True (default: False)" in text
    assert "about (4, 8); several: 3 5, or =3,5 (default: (4, 8))" in text


def test_help_begins_with_one_line_and_ends_with_the_commands_of_the_script(capsys):
    documentation = "Train.\n\n    python3 a.py --data D   100 %\n    python3 a.py\n\nMore.\n"
    first, second, *_, last = help_of(capsys, "-h", documentation=documentation).split("\n\n")
    assert first.startswith("usage: ")
    assert first.endswith(" [--flag=value ...]")
    assert second == "Train."
    assert last.startswith("Flags of the programs")
    text = help_of(capsys, "-h", documentation=documentation)
    assert "\n\nexamples:\n    python3 a.py --data D   100 %\n    python3 a.py\n\n" in text
    assert "More." not in text


def test_a_script_has_the_groups_it_asks_for_and_flags_of_its_own(capsys):
    p = flags.make_parser("Draw.", "files")
    flags.add(p, "-k --count", 3, "how many")
    args = p.parse_args(["--output_dir=a_b"])
    assert (args.count, args.output_dir, args.checkpoint) == (3, Path("a_b"), "")
    assert not hasattr(args, "data")
    with pytest.raises(SystemExit):
        p.parse_args(["--data=x"])
    assert "unrecognized arguments: --data=x" in capsys.readouterr().err


def test_a_preset_alone_is_unchanged():
    assert recipe_of() == RECIPES["small"]
    assert recipe_of("--recipe", "large") == RECIPES["large"]


def test_flags_override_fields_with_their_types():
    words = "--recipe large --name x -b 8 --lr 1 --steps 1 2 3 --scales 2 --none_yet 5 --augment"
    found = recipe_of(*words.split())
    expected = dataclasses.replace(
        RECIPES["large"],
        name="x",
        batch_size=8,
        lr=1.0,
        steps=(1, 2, 3),
        scales=(2.0,),
        none_yet=(5,),
        augment=True,
    )
    assert found == expected
    for one, other in zip(dataclasses.astuple(found), dataclasses.astuple(expected), strict=True):
        assert type(one) is type(other)
    assert isinstance(found.scales[0], float)


def test_a_tuple_may_stand_in_one_word():
    assert recipe_of("--steps=3,5", "--none-yet", "4", "2").steps == (3, 5)
    assert recipe_of("--steps=3 5").steps == (3, 5)
    assert recipe_of("--none_yet=7", "--scales=0.5").none_yet == (7,)
    assert recipe_of("--steps=").steps == ()
    assert recipe_of("--name=a,b").name == "a,b"
    assert recipe_of("--sides", "800,1333", "5,6").sides == ("800,1333", "5,6")  # texts are not cut


def test_a_tuple_can_be_emptied_and_a_switch_put_out():
    found = recipe_of("--steps", "--no-augment")
    assert found.steps == ()
    assert found.augment is False
    assert recipe_of("--no_augment").augment is False


@pytest.mark.parametrize("flag", ["--batch_size", "--eval_batch_size"])
def test_a_batch_has_an_image(flag, capsys):
    with pytest.raises(SystemExit):
        recipe_of(f"{flag}=0")
    assert f"{flag} 0: must be at least 1" in capsys.readouterr().err


def test_a_run_has_an_epoch():
    with pytest.raises(UserError, match="--epochs 0: must be above 0"):
        recipe_of("--epochs=0")


def test_a_flag_that_contradicts_the_checkpoint_is_refused():
    trained = {"path": "iter_1.pt", "recipe": dataclasses.asdict(Recipe())}
    args = parser().parse_args(["--batch_size=3"])
    flags.require_agreement(args, flags.chosen_recipe(args, RECIPES), trained)
    with pytest.raises(UserError, match=r"--batch_size 3: iter_1\.pt was trained with 8; omit it"):
        flags.require_agreement(
            args, dataclasses.replace(flags.chosen_recipe(args, RECIPES), batch_size=8), trained
        )


def test_the_name_may_differ_from_the_checkpoints():
    trained = {"path": "iter_1.pt", "recipe": dataclasses.asdict(Recipe(name="old"))}
    for words, name in (((), "old"), (("--name=Mine",), "Mine")):
        args = parser().parse_args(list(words))
        recipe = flags.require_agreement(args, Recipe(name="old"), trained)
        assert recipe.name == name


@pytest.mark.parametrize("recipe", [None, "yolo", {"lr": 0.1}, {"threshold": 1.0}])
def test_a_flag_that_contradicts_a_file_without_a_recipe_says_how_to_give_it(recipe):
    args = parser().parse_args(["--batch_size=3"])
    line = (
        r"^--batch_size 3: a\.pth does not say its recipe; its tensors look like those with 32; "
        r"omit it, or give the --recipe of this network with it$"
    )
    with pytest.raises(UserError, match=line):
        flags.require_agreement(args, Recipe(), {"path": "a.pth", "recipe": recipe})
    assert flags.ap_goal(args, {"path": "a.pth", "recipe": recipe}) == 0.0


def test_undocumented_fields_have_no_flag(capsys):
    with pytest.raises(SystemExit):
        recipe_of("--hidden", "3")
    assert "--hidden" in capsys.readouterr().err


def test_defaults_of_a_run():
    args = parser().parse_args([])
    assert (args.resume, args.save, args.kind, args.device) == ("none", True, "acc", "auto")
    assert (args.deterministic, args.timeout, args.output_dir) == (False, 1800, Path("output"))
    assert not any((args.data, args.checkpoint, args.pretrained, args.max_iters, args.num_classes))
    assert parser().parse_args(["--no_save"]).save is False
    assert parser().parse_args(["--local_rank=3"]).local_rank == 3


@pytest.mark.parametrize("given", [0, 80, 81])
def test_a_class_count_that_agrees(given):
    flags.check_num_classes(argparse.Namespace(num_classes=given), 80)


@pytest.mark.parametrize("given", [1, 79, 82])
def test_a_class_count_that_contradicts_the_file(given):
    with pytest.raises(UserError, match=f"--num_classes {given}: the annotations have 80"):
        flags.check_num_classes(argparse.Namespace(num_classes=given), 80)


def test_checkpoint_to_use(tmp_path, capsys):
    def use(folder, given=None):
        args = argparse.Namespace(checkpoint=given, output_dir=tmp_path / folder)
        return Path(flags.checkpoint_to_use(args, "tiny")["path"])

    with pytest.raises(
        UserError, match=r"no checkpoint of tiny in .*give one with --checkpoint_path"
    ):
        use("output")
    (tmp_path / "dangling").symlink_to("nowhere")
    launched = tmp_path / "test" / "output" / "0" / "iter_7.pt"
    checkpoint.save(launched, {"run": {}})
    assert use("output") == launched  # of the launch scripts
    for folder, steps in (("output", (1, 2)), ("output_20260101", (9,))):
        for step in steps:
            checkpoint.save(tmp_path / folder / f"iter_{step}.pt", {"run": {}})
    given = str(tmp_path / "output" / "iter_1.pt")
    assert use("output", given) == Path(given)
    assert use("output") == tmp_path / "output" / "iter_2.pt"
    assert tmp_path in use("elsewhere").parents  # a run beside it
    (tmp_path / "output" / "iter_3.pt").write_bytes(b"cut")
    assert use("output") == tmp_path / "output" / "iter_2.pt"
    assert "skipping checkpoint" in capsys.readouterr().err


def test_a_newer_run_of_another_model_is_passed_over(tmp_path, capsys):
    args = argparse.Namespace(checkpoint=None, output_dir=tmp_path / "output")
    contents = {
        "own": {"written_by": "tiny"},
        "other": {"written_by": "fcos"},
        "published": {"state_dict": {"mbox.0.weight": torch.zeros(1)}},
    }
    for age, (folder, content) in enumerate(contents.items()):
        checkpoint.save(tmp_path / folder / "iter_1.pt", content)
        os.utime(tmp_path / folder, (age, age))  # the last one is the newest
    assert flags.checkpoint_to_use(args, "tiny")["path"] == str(tmp_path / "own/iter_1.pt")
    assert capsys.readouterr().err.splitlines() == [
        f"skipping {tmp_path}/published/iter_1.pt: a detector of ssd_resnet34",
        f"skipping {tmp_path}/other/iter_1.pt: a detector of fcos",
    ]
    with pytest.raises(UserError, match=f"no checkpoint of m2det in {tmp_path}/output; give one"):
        flags.checkpoint_to_use(args, "m2det")


@pytest.mark.parametrize(
    "weights",
    [
        *("det.pth", "det.pt", "det.safetensors", "R-50.pkl", "det.npz", "det.zip", "det.onnx"),
        *("model.ckpt", "model.ckpt-1.index", "model.ckpt-1.data-00000-of-00001", "net.H5"),
        *("det.pth.tar", "det.pt2", "yolo.weights", "iter_5.pt.superseded"),
    ],
)
def test_weights_before_the_images_of_a_demo(weights):
    args = flags.parse_demo(flags.make_parser("Draw.", "files"), [weights, "a.jpg", "folder"])
    assert (args.checkpoint, args.inputs) == (weights, ["a.jpg", "folder"])


@pytest.mark.parametrize("image", ["a.jpg", "a.PNG", "folder", "a.tiff", "data.folder"])
def test_weights_after_the_images_of_a_demo(image):
    args = flags.parse_demo(flags.make_parser("Draw.", "files"), [image, "b.pth"])
    assert (args.checkpoint, args.inputs) == ("b.pth", [image])


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["a.jpg", "ssd300.py", "b.pth"], "ssd300.py: no config file is read"),
        (["a.pth", "a.jpg", "b.pth"], "a.pth, b.pth: give one file of weights"),
        (["a.jpg", "b.pth", "--checkpoint=c.pth"], "c.pth, b.pth: give one file of weights"),
    ],
)
def test_what_a_demo_cannot_use_is_answered(words, answer, capsys):
    with pytest.raises(SystemExit) as ended:
        flags.parse_demo(flags.make_parser("Draw.", "files"), words)
    assert ended.value.code == 2
    assert answer in capsys.readouterr().err


def test_launch_time(monkeypatch):
    monkeypatch.delenv("ONESTAGE_LAUNCH_TIME", raising=False)
    before = time.time()
    assert before <= parser().parse_args([]).started <= time.time()
    monkeypatch.setenv("ONESTAGE_LAUNCH_TIME", "1700000000.5")
    assert parser().parse_args([]).started == 1700000000.5


@pytest.mark.parametrize("flag", ["max_iters", "log-interval", "lr", "seed", "num_workers"])
def test_numbers_below_nought_are_refused(flag, capsys):
    least = -1 if flag == "num_workers" else 0
    parser().parse_args([f"--{flag}={least}"])
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args([f"--{flag}={least - 1}"])
    name = flag.replace("-", "_")
    assert capsys.readouterr().err.startswith(f"error: --{name} {least - 1}")


def test_the_best_checkpoint_that_finetuning_finds_is_a_flag_of_its_run(tmp_path):
    for name in ("best.pt", "iter_9.pt"):
        checkpoint.save(tmp_path / "former" / name, {"written_by": "net"})
    best = str(tmp_path / "former/best.pt")
    recipes = {**RECIPES, "finetune": Recipe()}
    parser = flags.make_parser("Train.", *flags.TRAINING_GROUPS, recipes=recipes)
    for preset, given in (("small", None), ("finetune", best)):
        args = parser.parse_args([f"--recipe={preset}", f"--output_dir={tmp_path}/new"])
        states = flags.starting_weights(args, "net", Ranks())
        assert [state["path"] for state in states] == ([given] if given else [])
        assert args.given.get("checkpoint") == given
    # An evaluation is of the newest one.
    assert flags.checkpoint_to_use(args, "net")["path"] == str(tmp_path / "former/iter_9.pt")
