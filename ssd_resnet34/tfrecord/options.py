"""The flags of the TFRecord recipe's programs, with the TensorFlow port's names."""

import os
from argparse import Namespace
from pathlib import Path

from common import flags
from common.errors import UserError
from common.fps.benchmark import DEFAULT_BATCH_SIZES
from common.npu.distributed import Ranks
from ssd_resnet34.tfrecord.config import RECIPES

MODES = ("train_and_eval", "train", "eval")
FILES_OF_MODE = {
    "train_and_eval": ("training_file_pattern", "validation_file_pattern", "val_json_file"),
    "train": ("training_file_pattern",),
    "eval": ("validation_file_pattern", "val_json_file"),
}
# Flags of the other programs that are the same here.
SHARED_FLAGS = (
    "--config",
    "-s --seed",
    "--save",
    "--num-workers",
    "--amp-backend",
    "--background-metrics",
    "--patience",
    "--accumulate",
    "--freeze",
    "--subset",
    "--cache",
    "--compile",
    "--ema",
    "--sync-bn",
    "--look",
    "--epoch",
    "--replay",
    "--profile",
    "--find-lr",
)


def parse(argv: list[str] | None, documentation: str) -> Namespace:
    """Parse the flags of `train.py` and `evaluate.py`, which are the same.

    The result has `card`, the number that `--device_id` gives, or None: then a process takes the
    device of its local rank. `device_id` is no device any more, but what `Run` and `RunLog` call
    the log: the number that was given, else the rank.
    """
    parser = flags.make_parser(
        documentation, "evaluation", "device", "process", recipes=RECIPES, trains=True
    )
    group = parser.add_argument_group("run")
    flags.add(group, "--mode", MODES[0], "what to do", choices=MODES)
    flags.add(group, "--training-file-pattern", "", "glob of the training shards, quoted")
    flags.add(group, "--validation-file-pattern", "", "glob of the validation shards, quoted")
    flags.add(group, "--val-json-file", "", "COCO's annotations of the validation set")
    flags.add(
        group,
        "--resnet-checkpoint",
        "",
        "weights to start from: TensorFlow's prefix or folder, or a .pth",
    )
    flags.add(
        group, "--model-dir --output-dir", Path("result_npu"), "folder of checkpoints, logs, eval/"
    )
    flags.add(
        group, "--resume", "auto", "auto: the newest checkpoint of --model_dir; none; or a file"
    )
    flags.add(group, "--max-iters", 0, "stop after this many steps; 0: after the epochs")
    flags.add(group, "--log-interval", 100, "steps between log lines")
    flags.add(group, "--save-interval", 5000, "steps between checkpoints")
    flags.add(group, "--keep --keep-checkpoint-max", 32, "checkpoints to keep")
    flags.add(
        group,
        "--check-data",
        False,
        "only read every record and image, say which boxes the network sees, then stop",
    )
    flags.add(group, "--eval-samples", 5000, "accepted, without effect: every record is evaluated")
    flags.add(
        group,
        "--benchmark",
        DEFAULT_BATCH_SIZES,
        "with --mode=eval: measure the speed of an image instead of accuracy, at these batch sizes",
        only_if_given=True,
    )
    for flag in flags.FLAGS:
        if flag.names in SHARED_FLAGS:
            flags.add(group, flag.names, flag.default, flag.help, flag.choices)
    parser.reads_config = True
    parser.set_defaults(device_id=None, tag="")
    args = parser.parse_args(argv)
    args.output_dir = args.model_dir
    args.kind = "acc" if args.mode == "train_and_eval" else "perf"
    args.card = args.device_id
    if args.device_id is None:
        args.device_id = Ranks.from_environment().rank
    return args


def require_files(args: Namespace, mode: str) -> None:
    """Raise UserError where a flag is missing that names a file which the mode reads."""
    for name in FILES_OF_MODE[mode]:
        if not getattr(args, name):
            raise UserError(f"--mode={mode} needs --{name}")


def require_ranks() -> None:
    """Raise UserError where the TensorFlow port's launcher has set RANK_SIZE but not RANK."""
    if "RANK" not in os.environ and os.environ.get("RANK_SIZE", "1") != "1":
        raise UserError("RANK_SIZE is set without RANK; start several ranks with run_npu_8p.sh")
