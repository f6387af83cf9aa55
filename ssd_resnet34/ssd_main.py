#!/usr/bin/env python3
"""Train and evaluate SSD300-ResNet34 on TFRecord files: the second recipe.

    python3 ssd_main.py --mode=train_and_eval --training_file_pattern='tfrecord/train2017*' \\
        --validation_file_pattern='tfrecord/val2017*' --val_json_file=instances_val2017.json \\
        --resnet_checkpoint=pretrain/model.ckpt-28152 --model_dir=result_npu

`run_npu_1p.sh` and `run_npu_8p.sh` start it with the paths of exec_main.sh.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: F401 before torch

# isort: split

import os
from dataclasses import replace

import torch

from common.errors import UserError
from common.fps.runlog import RunLog
from common.npu import checkpoint, cli, distributed, entry
from common.npu.device import be_deterministic, environment, memory_format, setup_device
from common.npu.distributed import Ranks
from common.npu.precision import Precision, default_level
from ssd_resnet34.evaluate import own_network
from ssd_resnet34.tfrecord.check import check_records
from ssd_resnet34.tfrecord.config import RECIPES, Recipe
from ssd_resnet34.tfrecord.data import build_loader, training_records
from ssd_resnet34.tfrecord.evaluate import assess, detect_all, validation_records
from ssd_resnet34.tfrecord.index import read_index
from ssd_resnet34.tfrecord.model import build_model
from ssd_resnet34.tfrecord.train import Training
from ssd_resnet34.tfrecord.weights import load_weights


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv)
    recipe = cli.chosen_recipe(args, RECIPES)
    if args.check_data:
        given = {"--training_file_pattern": args.training_file_pattern}
        given["--validation_file_pattern"] = args.validation_file_pattern
        return check_records(given, recipe)
    demand_files(args)
    if "RANK" not in os.environ and os.environ.get("RANK_SIZE", "1") != "1":
        raise UserError("RANK_SIZE is set without RANK; start several ranks with run_npu_8p.sh")

    ranks = Ranks.from_environment()
    card = ranks.card(0) if args.device_id is None else args.device_id
    args.device_id = ranks.rank if args.device_id is None else args.device_id
    device, why = setup_device(args.device, card)
    distributed.start(device, ranks, args.timeout)
    torch.manual_seed(args.seed)
    if args.deterministic:
        be_deterministic(device)
    run = evaluate if args.mode == "eval" else train
    return run(args, recipe, device, ranks, why)


def parse(argv: list[str] | None):
    parser = cli.parser(__doc__.split("\n")[0], "evaluation", "device", "process", recipes=RECIPES)
    group = parser.add_argument_group("run")
    for names, default, text in (
        ("--mode", ["train_and_eval", "train", "eval"], "what to do"),
        ("--training-file-pattern", "", "glob of the training shards, quoted"),
        ("--validation-file-pattern", "", "glob of the validation shards, quoted"),
        ("--val-json-file", "", "COCO's annotations of the validation set"),
        ("--resnet-checkpoint", "", "start weights: TensorFlow's prefix or folder, or a .pth"),
        ("--model-dir --output-dir", Path("result_npu"), "checkpoints, logs, eval/"),
        ("--resume", "auto", "auto: the newest checkpoint of --model_dir; none; or a file"),
        ("-s --seed", 0, "of order and augmentation"),
        ("--max-iters", 0, "stop after this many steps; 0: after the epochs"),
        ("--log-interval", 100, "steps between log lines"),
        ("--save-interval", 5000, "steps between checkpoints"),
        ("--keep --keep-checkpoint-max", 32, "checkpoints to keep"),
        ("--save", True, "write checkpoints"),
        ("--num-workers", -1, "loader processes per rank; -1: from its share of the cores"),
        ("--check-data", False, "only read every record and image, then stop"),
        ("--eval-samples", 5000, "accepted, without effect: every record is evaluated"),
    ):
        cli.add(group, names, default, text)
    parser.set_defaults(device_id=None)  # of a rank: its local rank
    args = parser.parse_args(argv)
    args.output_dir = args.model_dir
    args.kind = "acc" if args.mode == "train_and_eval" else "perf"
    return args


def demand_files(args) -> None:
    """Raise UserError where the mode lacks a file flag."""
    needed = [] if args.mode == "eval" else ["training_file_pattern"]
    if args.mode != "train":
        needed += ["validation_file_pattern", "val_json_file"]
    for name in needed:
        if not getattr(args, name):
            raise UserError(f"--mode={args.mode} needs --{name}")


def train(args, recipe: Recipe, device: torch.device, ranks: Ranks, why: str) -> int | None:
    """Training, and for `train_and_eval` one evaluation; an exit status if a signal ended it."""
    stop = entry.StopRequest()
    if recipe.iters_per_epoch(ranks.world_size) < 1:
        raise UserError("--num_examples_per_epoch is less than one step's images; give more")
    train_set = training_records(
        read_index(args.training_file_pattern, "--training_file_pattern", recipe.category_ids)
    )
    val_set = train_set
    if args.mode == "train_and_eval":
        val_set = validation_records(args, recipe.category_ids)
    level = getattr(args, "amp", None) or default_level(device, recipe.amp)
    precision = Precision(device, level, recipe.loss_scale, args.amp_dtype, args.amp_backend)
    resumed = checkpoint.to_resume(args.resume, args.model_dir) if ranks.main else None
    resumed = ranks.from_main(resumed)
    moved = checkpoint.make_room(args.model_dir, resumed is not None) if ranks.main else None
    ranks.barrier()
    workers = cli.workers_for(args, ranks.local_world_size)
    with RunLog(args.model_dir, ranks, args.device_id, workers) as log:
        log.header(
            env_info=environment(),
            config=recipe.listing(),
            seed=args.seed,
            exp_name=recipe.name,
        )
        for line in filter(None, (moved, why, f"precision: {precision}")):
            log.info(line)
        weights = [args.resnet_checkpoint] if args.resnet_checkpoint and not resumed else []
        training = Training(
            args, recipe, device, ranks, precision, log, train_set, val_set, resumed, weights
        )
        log.info(training.plan())
        loader = build_loader(
            recipe,
            train_set,
            True,
            ranks=ranks,
            workers=workers,
            seed=args.seed,
            start=training.iteration,
            end=training.end,
            pin_memory=device.type != "cpu",
        )
        status = training.run(iter(loader), stop)
        if status is None:
            training.finish()
    return status


def evaluate(args, recipe: Recipe, device: torch.device, ranks: Ranks, why: str) -> None:
    """Evaluation of the newest checkpoint."""
    state = ranks.from_main(checkpoint.newest(args.model_dir) if ranks.main else None)
    if state is None:
        raise UserError(f"no checkpoint in --model_dir={args.model_dir}; train first")
    kept = tuple(state.get("category_ids", recipe.category_ids))
    recipe = replace(own_network(recipe, state), category_ids=kept)
    records = validation_records(args, recipe.category_ids)
    model = build_model(recipe, len(recipe.category_ids))
    report = load_weights(model, state)
    model.to(device, memory_format=memory_format(device))
    workers = cli.workers_for(args, ranks.local_world_size)
    with RunLog(args.model_dir, ranks, args.device_id, workers) as log:
        log.info(why)
        log.info(f"{state['path']}: {report}")
        rows = detect_all(model, recipe, records, device, ranks, workers)
        if rows is None:
            return
        outcome = assess(rows, len(records), args, log.info)
        step, per_epoch = state["iteration"], recipe.iters_per_epoch(ranks.world_size)
        log.begin(step, step, per_epoch)
        lr = recipe.lr_at(step - 1, per_epoch, ranks.world_size, recipe.batch_size)
        log.val(step, lr, outcome.mmdet())


if __name__ == "__main__":
    entry.run(main)
