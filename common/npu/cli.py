"""Command-line flags: those all detectors share, and one for every field of a recipe."""

import argparse
import dataclasses
import os
import re
import sys
import time
from pathlib import Path

from common.errors import UserError
from common.npu import checkpoint
from common.npu.device import DEVICES
from common.npu.distributed import Ranks

# Group, names, default (of a list: the first of what there is to choose from), help.
FLAGS = (
    ("data", "-d --data --data-path", "", "COCO folder: annotations/, train2017/, val2017/"),
    ("data", "--train-annotations", "", "JSON file instead of the one in --data"),
    ("data", "--train-images", "", "folder instead of the one in --data"),
    ("data", "--val-annotations", "", "JSON file instead of the one in --data"),
    ("data", "--val-images", "", "folder instead of the one in --data"),
    ("data", "--num-workers", -1, "loader processes per rank; -1: from its share of the cores"),
    ("data", "--num-classes", 0, "checked, with or without background; 0: not"),
    ("files", "--output-dir", Path("output"), "logs, checkpoints, pictures"),
    ("files", "--checkpoint --checkpoint-path", "", "weights; default: the newest (train: none)"),
    ("evaluation", "--per-class", False, "print the AP of every class"),
    ("evaluation", "--eval-backend", ["pycocotools", "faster"], "faster: faster-coco-eval"),
    ("device", "--device", [*DEVICES], "what to run on"),
    ("device", "--device-id", 0, "card of a single process"),
    ("process", "--amp-dtype", ["auto", "fp16", "bf16"], "auto: bf16 on a CPU, else fp16"),
    ("process", "--amp-backend", ["native", "apex"], "apex: NVIDIA's or Ascend's"),
    ("process", "--deterministic", False, "same bits in every run"),
    ("process", "--timeout", 1800.0, "seconds to wait for a rank"),
    ("process", "--local-rank", 0, "what torch.distributed.launch may add; has no effect"),
    ("run", "--resume", "none", "go on from a file, or auto: the newest whole of --output-dir"),
    ("run", "--pretrained", "", "ImageNet weights of the backbone"),
    ("run", "-s --seed", 0, "of order and augmentation"),
    ("run", "--max-iters --profile", 0, "stop after this many steps; 0: after the epochs"),
    ("run", "--log-interval --print-interval", 20, "steps between log lines"),
    ("run", "--save-interval", 0, "steps between checkpoints; 0: an epoch"),
    ("run", "--keep", 2, "checkpoints to keep besides the best"),
    ("run", "--save", True, "write checkpoints"),
    ("run", "--check-data", False, "only check annotations and images, then stop"),
    ("run", "--fake-input", False, "repeat the first batch: speed without the loader"),
    ("run", "--kind", ["acc", "perf"], "perf: no evaluation at the end"),
    ("run", "--tag", "", "put before the experiment's name in the logs"),
)

INDEXED = re.compile(r"(--device[=\0](?:npu|cuda)):(\d+)")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; `--batch_size` and `--batch-size` are the same flag,
    `--device npu:1` is `--device npu --device_id 1`, `--steps=3,5` is `--steps 3 5`."""

    def parse_args(self, argv=None, namespace=None):
        words = sys.argv[1:] if argv is None else argv
        words = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in words]
        line = INDEXED.sub("\\1\0--device-id\0\\2", "\0".join(words))
        lists = (a for a in self._actions if a.nargs == "*" and a.type is not str)
        lists = {name for action in lists for name in action.option_strings}
        words = []
        for word in line.split("\0") if line else ():
            is_list = word.partition("=")[0] in lists
            words += filter(None, re.split("[=, ]", word)) if is_list else [word]
        args = super().parse_args(words, namespace)
        for name, value in vars(args).items():
            least = -1 if name in ("num_workers", "local_rank") else 0
            limit = 2**63 if isinstance(value, int) else float("inf")
            if isinstance(value, int | float) and not least <= value < limit:
                self.error(f"--{name} {value}: must be at least {least} and below {limit}")
        return args

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def parser(description: str, *groups: str, recipes: dict | None = None) -> Parser:
    """The parser of an entry script: the flags of these groups; with `recipes`, `--recipe NAME`
    and a flag for every documented field. `started`: when the launch script did, epoch seconds."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.set_defaults(started=float(os.environ.get("ONESTAGE_LAUNCH_TIME", time.time())))
    for title in groups:
        group = parser.add_argument_group(title)
        for *_, names, default, text in (row for row in FLAGS if row[0] == title):
            add(group, names, default, text)
    if recipes:
        group, preset = parser.add_argument_group("recipe"), next(iter(recipes.values()))
        add(group, "--recipe", [*recipes], "preset that the following flags change")
        for field in filter(lambda field: field.metadata, dataclasses.fields(preset)):
            names = " ".join(["--" + field.name.replace("_", "-"), *field.metadata["flags"]])
            add(group, names, getattr(preset, field.name), field.metadata["help"], given_only=True)
    return parser


def add(group, names: str, default: object, text: str, given_only: bool = False) -> None:
    """A flag of its default's type, as in FLAGS; `given_only`: no attribute unless it is given."""
    options = {"type": type(default)}
    if isinstance(default, bool):
        options = {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, tuple):
        options = {"type": type(next(iter(default), 0)), "nargs": "*"}
        text += "" if options["type"] is str else "; several: 3 5, or =3,5"
    elif isinstance(default, list):
        options, default = {"choices": default}, default[0]
    text += f" (default: {default})" if default != "" else ""
    action = group.add_argument(*names.split(), default=argparse.SUPPRESS, help=text, **options)
    if not given_only:
        action.default = default


def chosen_recipe(args: argparse.Namespace, recipes: dict):
    """The named preset with the given flags on top."""
    fields = {field.name for field in dataclasses.fields(recipes[args.recipe]) if field.metadata}
    given = {k: tuple(v) if type(v) is list else v for k, v in vars(args).items() if k in fields}
    recipe = dataclasses.replace(recipes[args.recipe], **given)
    for name in ("batch_size", "eval_batch_size", "epochs"):
        if getattr(recipe, name) < 1:
            raise UserError(f"--{name} {getattr(recipe, name)}: must be at least 1")
    return recipe


def workers_for(args: argparse.Namespace, ranks: int) -> int:
    """Loader processes of one of `ranks` on this host: as asked, or from its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return args.num_workers if args.num_workers >= 0 else max(0, min(16, cores // ranks - 1))


def checkpoint_to_use(args: argparse.Namespace, ranks: Ranks | None = None) -> dict:
    """`--checkpoint`, else the main rank's newest whole one of `--output-dir`, else of a folder
    beside it or of the launch scripts' in there."""
    if args.checkpoint:
        return checkpoint.load(args.checkpoint)
    ranks, root = ranks or Ranks(), args.output_dir.absolute().parent
    beside = filter(Path.is_dir, (*root.glob("*"), *root.glob("test/output/*")))
    folders = [args.output_dir, *sorted(beside, key=os.path.getmtime, reverse=True)]
    found = filter(None, map(checkpoint.newest, folders if ranks.main else ()))
    if state := ranks.from_main(next(found, None)):
        return state
    raise UserError(f"no checkpoint in {args.output_dir}; give one with --checkpoint_path")


def check_num_classes(args: argparse.Namespace, classes: int) -> None:
    """Old scripts give --num-classes, background included; the annotation file decides."""
    if (given := args.num_classes) not in (0, classes, classes + 1):
        raise UserError(f"--num_classes {given}: the annotations have {classes}; omit it")
