"""Command-line flags: those all detectors share, and one for every field of a recipe."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from common.coco.index import find_coco
from common.npu import checkpoint
from common.npu.device import DEVICES
from common.npu.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; `--batch_size` and `--batch-size` are the same flag."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options
        )

    def parse_args(self, argv=None, namespace=None):
        return super().parse_args(
            [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)], namespace
        )

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def add_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "-d",
        "--data",
        "--data-path",
        dest="data",
        metavar="DIR",
        help="COCO folder: annotations/, train2017/, val2017/",
    )
    for split in ("train", "val"):
        group.add_argument(
            f"--{split}-annotations", metavar="JSON", help="instead of the one in --data"
        )
        group.add_argument(f"--{split}-images", metavar="DIR", help="instead of the one in --data")
    group.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="loader processes per rank; default: up to 16, one less than its share of the cores",
    )
    group.add_argument(
        "--num-classes", type=int, help="checked against the annotation file, background included"
    )


def add_device_flags(parser: Parser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", choices=DEVICES, help="what to run on")
    group.add_argument("--device-id", type=int, default=0, help="card of a single process")
    group.add_argument("--amp-dtype", default="auto", choices=("auto", "fp16", "bf16"))
    group.add_argument("--amp-backend", default="native", choices=("native", "apex"))
    group.add_argument("--deterministic", action="store_true", help="same bits in every run")
    group.add_argument("--timeout", type=float, default=1800, help="seconds to wait for a rank")
    # What torch.distributed.launch without --use_env adds.
    group.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)


def add_output_flags(parser: Parser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "--output-dir", type=Path, default=Path("output"), help="logs, checkpoints, pictures"
    )
    group.add_argument(
        "--checkpoint",
        "--checkpoint-path",
        dest="checkpoint",
        metavar="FILE",
        help="training: weights to start from, heads of another class count are initialised anew; "
        "elsewhere: weights to use, by default the newest checkpoint of --output-dir",
    )


def add_evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--per-class", action="store_true", help="print the AP of every class")
    group.add_argument(
        "--eval-backend",
        default="pycocotools",
        choices=("pycocotools", "faster"),
        help="faster: faster-coco-eval, the same numbers in less time",
    )


def add_run_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--resume",
        default="none",
        metavar="auto|FILE",
        help="go on from the newest whole checkpoint of --output-dir, or from a file",
    )
    group.add_argument("--pretrained", metavar="FILE", help="ImageNet weights of the backbone")
    group.add_argument("-s", "--seed", type=int, default=0, help="of order and augmentation")
    group.add_argument(
        "--max-iters", "--profile", dest="max_iters", type=int, help="stop after this many steps"
    )
    group.add_argument(
        "--log-interval", "--print-interval", dest="log_interval", type=int, default=20
    )
    group.add_argument(
        "--save-interval", type=int, help="steps between checkpoints; default: an epoch"
    )
    group.add_argument("--keep", type=int, default=2, help="checkpoints to keep besides the best")
    group.add_argument("--no-save", dest="save", action="store_false", help="write no checkpoint")
    group.add_argument(
        "--check-data", action="store_true", help="only check annotations and images, then stop"
    )
    group.add_argument(
        "--fake-input", action="store_true", help="repeat the first batch (speed without loader)"
    )
    group.add_argument(
        "--kind", default="acc", choices=("acc", "perf"), help="perf: no evaluation at the end"
    )
    group.add_argument("--tag", default="", help="put before the experiment's name in the logs")


def add_recipe_flags(parser: Parser, recipes: dict) -> None:
    """`--recipe NAME` and, for every documented field, a flag that overrides it."""
    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", default=next(iter(recipes)), choices=tuple(recipes))
    recipe = next(iter(recipes.values()))
    for field in dataclasses.fields(recipe):
        if "help" not in field.metadata:
            continue
        default = getattr(recipe, field.name)
        options = {"dest": field.name, "default": argparse.SUPPRESS}
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        options["help"] = f"{field.metadata['help']} (default: {shown})"
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options.update(type=type(default[0]) if default else int, nargs="*")
        else:
            options["type"] = type(default)
        name = "--" + field.name.replace("_", "-")
        group.add_argument(name, *field.metadata["flags"], **options)


def chosen_recipe(args: argparse.Namespace, recipes: dict):
    """The named preset with the given flags on top."""
    recipe = recipes[args.recipe]
    given = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in dataclasses.fields(recipe)
        if (value := getattr(args, field.name, None)) is not None
    }
    for name in ("batch_size", "eval_batch_size", "epochs"):
        if given.get(name, 1) < 1:
            raise UserError(f"--{name} {given[name]}: must be at least 1")
    return dataclasses.replace(recipe, **given)


def workers_for(asked: int | None, local_world_size: int) -> int:
    """Loader processes of this rank: as asked, or from its share of the cores."""
    if asked is not None:
        if asked < 0:
            raise UserError(f"--num_workers {asked}: must be 0 or more")
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, min(16, cores // local_world_size - 1))


def data_files(args: argparse.Namespace, split: str) -> tuple[str, str]:
    """Annotation file and image folder of "train" or "val"."""
    annotations = getattr(args, f"{split}_annotations")
    images = getattr(args, f"{split}_images")
    return find_coco(args.data, split, annotations=annotations, images=images)


def checkpoint_to_use(args: argparse.Namespace) -> Path:
    """`--checkpoint`, or the newest whole one of `--output-dir` or of the folders beside it."""
    if args.checkpoint:
        return Path(args.checkpoint)
    beside = args.output_dir.absolute().parent.glob("*/")
    by_time = sorted(beside, key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in (args.output_dir, *by_time):
        path, skipped = checkpoint.newest(folder)
        for line in skipped:
            print(line, file=sys.stderr)
        if path is not None:
            return path
    raise UserError(f"no checkpoint in {args.output_dir}; give one with --checkpoint_path")


def check_num_classes(args: argparse.Namespace, classes: int) -> None:
    """Old scripts give --num-classes, background included; the annotation file decides."""
    if args.num_classes not in (None, classes, classes + 1):
        raise UserError(
            f"--num_classes {args.num_classes}: the annotation file has {classes} categories "
            f"({classes + 1} with background); leave the flag out"
        )


def launch_time(fallback: float) -> float:
    """When the launch script started, in seconds since 1970, else `fallback`."""
    return float(os.environ.get("ONESTAGE_LAUNCH_TIME", fallback))
