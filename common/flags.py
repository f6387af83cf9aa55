"""Command-line flags: those all detectors share, and one for every documented field of a recipe."""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.coco.evaluation import EvaluationOptions
from common.coco.metrics import BEST
from common.errors import UserError
from common.npu import checkpoint
from common.npu.device import DEVICES
from common.npu.distributed import Ranks
from common.npu.identify import model_of
from common.npu.weights import recipe_entry, tensors_of
from common.parser import (
    CONFIG_SUFFIX,
    PRESET_FLAG,
    OldFlag,
    Parser,
    answered,
    explain_unknown,
    is_checkpoint_name,
    needless,
    renamed,
)


class Flag(NamedTuple):
    """A shared flag; its type is that of its default."""

    group: str
    names: str  # separated by spaces
    default: object
    help: str
    choices: tuple[str, ...] = ()


FLAGS = (
    # Where the data is.
    Flag("data", "-d --data --data-path", "", "COCO folder: annotations/, train2017/, val2017/"),
    Flag("data", "--train-annotations", "", "JSON file instead of the one in --data"),
    Flag("data", "--train-images", "", "folder instead of the one in --data"),
    Flag("data", "--val-annotations", "", "JSON file instead of the one in --data"),
    Flag("data", "--val-images", "", "folder instead of the one in --data"),
    Flag("data", "--num-workers", -1, "loader processes of each rank; -1: its share of the cores"),
    Flag(
        "data",
        "--num-classes",
        0,
        "number of classes, with or without background, checked against the annotation file; "
        "0: no check",
    ),
    # Which files are read and written.
    Flag("files", "--output-dir", Path("output"), "logs, checkpoints, pictures"),
    Flag(
        "files",
        "--checkpoint --checkpoint-path",
        "",
        "file of weights; by default the newest checkpoint (training: none; finetune: the best)",
    ),
    # How results are reported.
    Flag("evaluation", "--per-class", False, "print the figures of every class"),
    Flag(
        "evaluation",
        "--analysis",
        True,
        "explain what went wrong, in training at its end: costs of errors, worst images, suspect "
        "labels",
    ),
    Flag(
        "evaluation",
        "--eval-backend",
        "pycocotools",
        "faster: the package faster-coco-eval",
        choices=("pycocotools", "faster"),
    ),
    # What the process runs on.
    Flag("device", "--device", "auto", "what to run on", choices=DEVICES),
    Flag("device", "--device-id", 0, "card of a single process"),
    Flag(
        "process",
        "--amp-dtype",
        "auto",
        "half type; auto: bf16 on a CPU, else fp16",
        choices=("auto", "fp16", "bf16"),
    ),
    Flag(
        "process", "--deterministic", False, "compute the same bits in every run; implies --exact"
    ),
    Flag(
        "process", "--exact", False, "compute fp32 with all its bits: no TF32 (CUDA), no HF32 (NPU)"
    ),
    Flag("process", "--timeout", 1800.0, "seconds to wait for another rank"),
    Flag("process", "--local-rank", 0, "has no effect; torch.distributed.launch may add it"),
    # The course of a training run.
    Flag(
        "run",
        "--config",
        "",
        "JSON file of flags; the run.json of a run starts that run again; flags of the command "
        "line count more",
    ),
    Flag(
        "run",
        "--resume",
        "none",
        "checkpoint to go on from; auto: the newest undamaged one in --output-dir",
    ),
    Flag("run", "--pretrained", "", "file with ImageNet weights of the backbone"),
    Flag("run", "-s --seed", 0, "seed of the order of images and of the augmentation"),
    Flag("run", "--max-iters", 0, "end after this many steps; 0: after the epochs"),
    Flag(
        "run",
        "--profile",
        0,
        "only measure this many steps (phases, operators, memory) and the loader alone; 0: train",
    ),
    Flag(
        "run",
        "--log-interval --print-interval",
        20,
        "steps between log lines; if not given, there is at most one line a second",
    ),
    Flag(
        "run",
        "--save-interval",
        0,
        "steps between checkpoints; 0: at the ends of epochs, at least 3 minutes apart",
    ),
    Flag("run", "--keep", 2, "how many of the newest checkpoints to keep, besides the best"),
    Flag("run", "--save", True, "write checkpoints"),
    Flag(
        "run",
        "--check-data",
        False,
        "only check annotations and images, say which boxes this preset sees, then stop",
    ),
    Flag("run", "--look", 0, "only draw this many training samples as the network gets them"),
    Flag("run", "--epoch", 1, "with --look: the epoch, from 1, whose first samples are drawn"),
    Flag(
        "run",
        "--replay",
        0,
        "only draw the batch of this step, from 1, of the run in --output-dir again",
    ),
    Flag(
        "run",
        "--find-lr",
        False,
        "only raise the learning rate step by step, draw the losses and suggest a rate; nothing is "
        "trained",
    ),
    Flag("run", "--fake-input", False, "repeat the first batch: speed without the loader"),
    Flag("run", "--kind", "acc", "perf: no evaluation at the end", choices=("acc", "perf")),
    Flag(
        "run",
        "--background-metrics",
        False,
        "compute COCO's metrics in a process of its own while training goes on; they are logged "
        "as soon as they are known",
    ),
    Flag(
        "run",
        "--accumulate",
        1,
        "send a batch through the network in so many equal parts, which takes less memory; batch "
        "norm sees a part at a time",
    ),
    Flag(
        "run",
        "--freeze",
        "",
        "what stays as it is: backbone, or the number of its first stages",
    ),
    Flag(
        "run",
        "--subset",
        "",
        "train on this many images, or on a share such as 0.1, drawn by --seed",
    ),
    Flag(
        "run",
        "--cache",
        "none",
        "ram: keep the bytes of the training set's files in memory, once for all processes of a "
        "host",
        choices=("none", "ram"),
    ),
    Flag(
        "run",
        "--ema",
        0.0,
        "evaluate and save a moving average of the weights, with this decay (0.9998); 0: none",
    ),
    Flag("run", "--sync-bn", False, "batch norm over the images of all processes together"),
    Flag("run", "--patience", 0, "end after this many evaluations without a higher AP; 0: do not"),
    Flag(
        "run",
        "--amp-backend",
        "native",
        "apex: NVIDIA's or Ascend's",
        choices=("native", "apex"),
    ),
    Flag("run", "--compile", False, "compile the step with torch.compile (CUDA, CPU)"),
    Flag("run", "--tag", "", "put before the experiment's name in the logs"),
)

# The flags that name data, which are read as long as a run lasts; those of the TFRecord recipe are
# among them. Weights are read once, before a former run is renamed: they may lie in its folder.
INPUTS = (
    "data",
    "train_annotations",
    "train_images",
    "val_annotations",
    "val_images",
    "training_file_pattern",
    "validation_file_pattern",
    "val_json_file",
)

# The flags of MMDetection's programs, and those that several of the Ascend ports had.
OLD_FLAGS = (
    *renamed("--learning-rate", "--lr"),
    *renamed("--opt-level", "--amp"),
    *needless("--amp", value=""),
    *renamed("--work-dir --train-url", "--output-dir"),
    *renamed("--data-url", "--data"),
    *renamed("--resume-from", "--resume"),
    *renamed("--auto-resume", "--resume=auto"),
    *renamed("--resume", "--resume=auto", value=""),
    *renamed("--load-from", "--checkpoint"),
    *renamed("--no-validate", "--kind=perf"),
    *renamed("--max-steps", "--max-iters"),
    *answered(
        "--cfg-options --options",
        "each number of the recipe has a flag of its own, such as --lr=0.01",
    ),
    *answered("--eval-options", "--per_class and --format_only of evaluate.py are what there is"),
    *answered("--auto-scale-lr", "the rate follows the global batch by itself; see --lr"),
    *answered("--tta", "there is no test-time augmentation; omit it"),
    *answered("--wait-time", "pictures are written, not shown; omit it"),
    *answered(
        "--gpus --gpu-ids --gpu-id --npus --npu-ids",
        "--device_id=N takes the card of one process, test/train_full_8p.sh --nproc_per_node=N "
        "starts N processes",
    ),
    *needless("--launcher", value="none"),
    *needless("--launcher", value="pytorch"),
    *answered("--launcher", "start the processes with torchrun or test/train_full_8p.sh"),
    # Evaluation
    *needless("--eval", value="bbox"),
    *answered("--eval", "COCO's metrics of boxes are always computed; omit it"),
    *answered("--out", "the detections are in results.bbox.json of --output_dir"),
    *answered(
        "--show --show-dir --show-score-thr",
        "demo.py draws detections, and detections.png of --output_dir shows some",
    ),
    *answered("--tmpdir --gpu-collect", "results never pass through files; omit it"),
    *answered("--fuse-conv-bn", "has no counterpart; omit it"),
)
OLD_FLAGS_SENTENCE = """\
Flags of the programs that this one replaces work too, or are answered with
today's."""
COMMAND_INDENT = " " * 4  # of the commands in a script's docstring
FIND = "auto"  # instead of the number of images of a batch
TRAINING_GROUPS = ("data", "files", "run", "evaluation", "device", "process")


def make_parser(
    documentation: str,
    *groups: str,
    recipes: dict | None = None,
    log_interval: int | None = None,
    old_flags: tuple[OldFlag, ...] = (),
    trains: bool = False,
) -> Parser:
    """Return the parser of an entry script, with the shared flags of these groups.

    Of `documentation`, the script's docstring, `--help` shows the first line and the commands.
    `log_interval` is another default of that flag. `old_flags` of the model come before `OLD_FLAGS`
    of all. With `recipes` there is `--recipe NAME` and a flag for every documented field as well.
    In a program that `trains`, as those with the group "run" do, `--batch_size` may be FIND.
    The parsed arguments have `started`, the time in epoch seconds at which the launch script did.
    """
    commands = [line for line in documentation.splitlines() if line.startswith(COMMAND_INDENT)]
    examples = ["examples:", *commands, ""] if commands else []
    parser = Parser(
        description=documentation.split("\n")[0],
        epilog="\n".join([*examples, OLD_FLAGS_SENTENCE]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.old_flags = (*old_flags, *OLD_FLAGS)
    parser.reads_config = "run" in groups
    started = os.environ.get("ONESTAGE_LAUNCH_TIME", time.time())
    parser.set_defaults(started=float(started), find_batch_size=False)
    for title in groups:
        group = parser.add_argument_group(title)
        for flag in FLAGS:
            if flag.group != title:
                continue
            default = flag.default
            if flag.names.startswith("--log-interval") and log_interval is not None:
                default = log_interval
            add(group, flag.names, default, flag.help, choices=flag.choices)
    if recipes:
        _add_recipe_flags(parser, recipes, finds_batch_size=trains or "run" in groups)
    return parser


def _add_recipe_flags(parser: Parser, recipes: dict, finds_batch_size: bool) -> None:
    group = parser.add_argument_group("recipe")
    names = tuple(recipes)
    add(
        group,
        PRESET_FLAG,
        names[0],
        "preset that the following flags change; --help --recipe=NAME shows its defaults",
        choices=names,
    )
    preset = recipes[names[0]]
    helps = {name: {} for name in recipes}
    for field in dataclasses.fields(preset):
        if not field.metadata:  # an undocumented field has no flag
            continue
        flag = "--" + field.name.replace("_", "-")
        flag_names = " ".join([flag, *field.metadata["flags"]])
        text = field.metadata["help"]
        type_ = None
        if finds_batch_size and field.name == "batch_size":
            text += f", or {FIND}: the largest number that fits the device"
            type_ = number_or_find
        add(group, flag_names, getattr(preset, field.name), text, only_if_given=True, type_=type_)
        for name, recipe in recipes.items():
            helps[name][field.name] = _with_default(text, getattr(recipe, field.name))
    parser.preset_helps = helps


def add(
    group: argparse.ArgumentParser | argparse._ArgumentGroup,
    names: str,
    default: object,
    text: str,
    choices: tuple[str, ...] = (),
    only_if_given: bool = False,
    type_: Callable[[str], object] | None = None,
) -> None:
    """Add a flag of its default's type, or of `type_`.

    `only_if_given`: the parsed arguments have no such attribute unless the flag is given.
    """
    if isinstance(default, bool):
        options = {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, tuple):
        element = type(default[0]) if default else int
        options = {"type": element, "nargs": "*"}
    elif choices:
        options = {"choices": choices}
    else:
        options = {"type": type_ or type(default)}
    action = group.add_argument(
        *names.split(),
        default=argparse.SUPPRESS,
        help=_with_default(text, default),
        **options,
    )
    if not only_if_given:
        action.default = default


def _with_default(text: str, default: object) -> str:
    """Return the text of a flag in `--help`."""
    if isinstance(default, tuple) and not any(isinstance(element, str) for element in default):
        text += "; several: 3 5, or =3,5"
    if default != "":
        text += f" (default: {default})"
    return text


def parse_demo(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a demo, after adding those that all demos have.

    `inputs` of the result are the images, videos and folders. A file of weights among them becomes
    `checkpoint`: old commands name it first or last, beside a config file, which is answered.
    """
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="FILE.pth|IMAGE|VIDEO|FOLDER",
        help="weights may be among them; a number is a camera; default: sample images",
    )
    parser.add_argument("--img", nargs="+", default=[], metavar="IMAGE|FOLDER", help="the same")
    add(parser, "--show-dir", Path("demo_output"), "folder of the pictures")
    parser.add_argument(
        "--min-score",
        "--score-thr",
        type=score_or_best,
        default=0.3,
        help="lowest score that is drawn; best: of each class the one with the best F1, from the "
        "metrics.json beside the checkpoint (default: 0.3)",
    )
    add(parser, "--coco", False, "write all detections in COCO's format for results as well")
    add(parser, "--show", False, "no effect: pictures are written, see --show-dir")
    args = parser.parse_args(argv)
    if args.show:
        print(f"--show has no effect: the pictures will be in {args.show_dir}")
    args.inputs += args.img
    weights = [name for name in args.inputs if is_checkpoint_name(name)]
    configs = [name for name in args.inputs if name.endswith(CONFIG_SUFFIX)]
    if configs:
        parser.error(explain_unknown(configs))
    if len(weights) > 1 or (weights and args.checkpoint):
        named = [args.checkpoint, *weights] if args.checkpoint else weights
        parser.error(f"{', '.join(named)}: give one file of weights")
    if weights:
        args.checkpoint = weights[0]
        args.inputs.remove(weights[0])
    return args


def score_or_best(text: str) -> float | str:
    """Return the value of `--min_score`: a number, or BEST as it is."""
    if text == BEST:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number or {BEST!r}") from None


def number_or_find(text: str) -> int | str:
    """Return the value of a training program's `--batch_size`: a number, or FIND as it is."""
    if text == FIND:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number or {FIND!r}") from None


def chosen_recipe(args: argparse.Namespace, recipes: dict):
    """Return the preset of `--recipe` with the given flags on top.

    Where `--batch_size` is FIND, the batch is the preset's until it is found, as if it had not been
    given; then `args.find_batch_size` is set.
    """
    if getattr(args, "batch_size", None) == FIND:
        args.find_batch_size = True
        del args.batch_size
    preset = recipes[args.recipe]
    changes = {}
    for field in dataclasses.fields(preset):
        if field.metadata and hasattr(args, field.name):
            value = getattr(args, field.name)
            changes[field.name] = tuple(value) if isinstance(value, list) else value
    recipe = dataclasses.replace(preset, **changes)
    if recipe.epochs <= 0:
        raise UserError(f"--epochs {recipe.epochs}: must be above 0")
    return recipe


def require_agreement(args: argparse.Namespace, recipe, checkpoint: dict):
    """Return the recipe that is taken from a checkpoint, with the `--name` that is given.

    Raise UserError where another flag contradicts it.
    """
    if hasattr(args, "name"):  # the flag was given; it is no more than a word in the logs
        recipe = dataclasses.replace(recipe, name=args.name)
    for field in dataclasses.fields(recipe):
        if not field.metadata or not hasattr(args, field.name):
            continue
        given = getattr(args, field.name)
        if isinstance(given, list):
            given = tuple(given)
        trained = getattr(recipe, field.name)
        if given != trained:
            problem = f"--{field.name} {given}: {checkpoint['path']}"
            if recipe_entry(checkpoint):
                raise UserError(f"{problem} was trained with {trained}", "omit it")
            raise UserError(
                f"{problem} does not say its recipe; its tensors look like those with {trained}",
                "omit it, or give the --recipe of this network with it",
            )
    return recipe


def inputs(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the files and folders of data that a run is told to read, as they are given."""
    paths = []
    for name in INPUTS:
        path = getattr(args, name, "")
        if path:
            paths.append(path)
    return tuple(paths)


def evaluation_options(args: argparse.Namespace) -> EvaluationOptions:
    """Return what the flags of the group "evaluation" ask for."""
    return EvaluationOptions(
        per_class=args.per_class,
        faster=args.eval_backend == "faster",
        analysis=args.analysis,
    )


def ap_goal(args: argparse.Namespace, checkpoint: dict) -> float:
    """Return the AP at which training ends, 0 where there is no such goal.

    It is that of `--threshold`, else that of the run which wrote the checkpoint: an evaluation does
    not know the run's preset.
    """
    if hasattr(args, "threshold"):  # the flag was given
        return args.threshold
    return recipe_entry(checkpoint).get("threshold", 0.0)


def starting_weights(args: argparse.Namespace, model: str, ranks: Ranks) -> list[dict]:
    """Load the checkpoints that a new run starts from: the backbone's, then the detector's.

    `--recipe finetune` without either takes the checkpoint of highest AP of the newest run of
    `model`, and notes it as a flag that was given: the run may not be the newest when this one is
    repeated. All ranks must call it.
    """
    states = []
    for path in (args.pretrained, args.checkpoint):
        if path:
            states.append(checkpoint.load(path))
    if args.recipe == "finetune" and not states:
        states.append(checkpoint_to_use(args, model, ranks, checkpoint.load_best))
        args.given["checkpoint"] = states[0]["path"]
    return states


def checkpoint_to_use(
    args: argparse.Namespace,
    model: str,
    ranks: Ranks | None = None,
    load_from: Callable[[Path], dict | None] = checkpoint.load_newest,
) -> dict:
    """Load `--checkpoint`, else the newest whole checkpoint that the main rank finds.

    It looks in `--output-dir`, then in folders beside it and in those of the launch scripts there,
    the last changed one first. `load_from` takes a checkpoint of a folder, None where it has none.
    Runs of other models than `model` are passed over. Raise UserError where there is none.
    """
    if args.checkpoint:
        return checkpoint.load(args.checkpoint)
    ranks = ranks or Ranks()
    state = None
    if ranks.main:
        state = _newest_around(args.output_dir, model, load_from)
    state = ranks.from_main(state)
    if state is None:
        raise UserError(
            f"no checkpoint of {model} in {args.output_dir}", "give one with --checkpoint_path"
        )
    return state


def _newest_around(
    output_dir: Path, model: str, load_from: Callable[[Path], dict | None]
) -> dict | None:
    parent = output_dir.absolute().parent
    neighbours = [*parent.glob("*"), *parent.glob("test/output/*")]
    folders = [path for path in neighbours if path.is_dir()]
    folders.sort(key=os.path.getmtime, reverse=True)
    for folder in (output_dir, *folders):
        state = load_from(folder)
        if state is None:
            continue
        actual = model_of(state, tensors_of(state))
        if actual in ("", model):
            return state
        print(f"skipping {state['path']}: a detector of {actual}", file=sys.stderr)
    return None


def check_num_classes(args: argparse.Namespace, num_classes: int) -> None:
    """Raise UserError where `--num-classes` contradicts the annotation file, which decides.

    The old scripts count the background as well.
    """
    if args.num_classes not in (0, num_classes, num_classes + 1):
        raise UserError(
            f"--num_classes {args.num_classes}: the annotations have {num_classes}; omit it"
        )
