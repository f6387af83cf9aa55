#!/usr/bin/env python3
"""Train M2Det on COCO (layout of 2014 or 2017) or on any COCO-format data set.

    python3 train.py --data DIR                                        one device
    python3 ../common/npu/launch.py --nproc_per_node=8 train.py --data DIR
    ... --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --local_addr=10.0.0.1    several nodes

Recipe (the Ascend port's): SGD, warm-up and steps, batch 16 a device, 160 epochs, 512 x 512.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

from argparse import SUPPRESS
from dataclasses import replace
from functools import partial

from torch import nn

from common import flags
from common.coco.check import check_data
from common.coco.coverage import Presets
from common.coco.index import CocoIndex
from common.coco.layout import Files
from common.coco.report import image_by_id, turned_images
from common.coco.sampling import balance_line
from common.coco.trained import trained_boxes_line
from common.errors import UserError
from common.fps.network_size import size_line
from common.fps.progress import Progress
from common.fps.rate_sweep import sweep_rates
from common.fps.replay import Pipeline, draw_batches
from common.npu import distributed, entry
from common.npu.batch_search import find_batch_size
from common.npu.checkpoint import load as load_checkpoint
from common.npu.device import memory_format
from common.npu.loading import repeat_first_batch, require_memory_for_batch
from common.npu.precision import build_sgd, set_learning_rate
from common.npu.run import Run, RunState
from common.npu.trial_step import TrialStep, step_alone
from common.npu.weights import named_classes
from m2det.augment import augment
from m2det.config import RECIPES, Recipe
from m2det.coverage import MATCHING
from m2det.data import (
    TURNS_IF_BOTH_FIT,
    build_loader,
    find_files,
    iterations_per_epoch,
    largest_sample,
    read_records,
    untrained_boxes,
)
from m2det.evaluate import detect_all, evaluate_and_save
from m2det.look import samples_of_batch
from m2det.loss import DetectionLoss
from m2det.model import backbone_stages, build_model
from m2det.old_flags import OLD_FLAGS
from m2det.weights import load_weights, note_on_image_size, recipe_of_checkpoint

# Where the port keeps the backbone's ImageNet weights.
PRETRAINED = Path(__file__).resolve().parent / "weights" / "vgg16_reducedfc.pth"
LOSSES = ("loss_cls", "loss_bbox", "loss")
REMEDY = (
    "clip gradients with --clip_each=1 or --clip_norm=10, lower --lr (the port's is 0.001, the "
    "original's 0.004), use --loss_scale=dynamic, or see --check_data"
)


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv)
    recipe = flags.chosen_recipe(args, RECIPES)
    train_files = find_files(args.data, "train", args.train_annotations, args.train_images)
    val_files = find_files(args.data, "val", args.val_annotations, args.val_images)
    if args.check_data:
        return check_data(
            train_files,
            val_files,
            partial(untrained_boxes, recipe=recipe),
            TURNS_IF_BOTH_FIT,
            args.output_dir,
            Presets(args.recipe, recipe, RECIPES, MATCHING),
        )

    # All that the run needs is read and built first. A former run's folder is moved only after
    # that, by `open_output`: a run that is refused changes nothing.
    run = Run.start(args, recipe)
    recipe = replace(recipe, amp=run.precision.level)  # on a CPU it may be another one
    if run.resumed is None:
        weights = flags.starting_weights(args, recipe.model, run.ranks)
        if not weights:
            weights = default_backbone(recipe)
        trained = weights
    else:
        weights = []
        trained = [run.resumed]
    for checkpoint in trained:
        requested = recipe
        recipe = recipe_of_checkpoint(requested, checkpoint)
        recipe = flags.require_agreement(args, recipe, checkpoint)
        run.log_network_change(checkpoint, requested, recipe)
        note = note_on_image_size(args.recipe, recipe, checkpoint)
        if note is not None:
            run.log.info(note)
    train_set, val_set = read_data(run, recipe, train_files, val_files, weights)
    num_classes = len(train_set.class_names)
    flags.check_num_classes(args, num_classes)
    if recipe.balance:
        run.log.info(balance_line(train_set, recipe.balance))
    canvas = (recipe.image_size, recipe.image_size)
    require_memory_for_batch(recipe.batch_size, canvas, run.ranks, run.device)

    if not run.settings.find_batch_size:
        require_trainable(recipe, run)
    model = build_model(recipe, num_classes)
    for checkpoint in weights:
        report = load_weights(model, checkpoint, train_set.class_names)
        run.log.info(f"{checkpoint['path']}: {report}")
    if not weights and run.resumed is None:
        run.log.info("weights: random; for --pretrained: bash download_weights.sh m2det")
    run.freeze(model, backbone_stages(model), has_weights=len(trained) > 0)
    run.synchronise_norms(model)
    if run.ranks.main and not run.only_draws:
        run.log.info(size_line(model, recipe.image_size, recipe.image_size))
    model.to(run.device, memory_format=memory_format(run.device))
    detection_loss = DetectionLoss(recipe, num_classes).to(run.device)
    criterion = run.compiled(detection_loss, "loss")
    if run.only_draws:
        pipeline = Pipeline(recipe, train_set, build_loader, augment, samples_of_batch, criterion)
        steps_per_epoch = iterations_per_epoch(train_set, recipe, run.drawn_world_size)
        draw_batches(run, pipeline, model, steps_per_epoch, recipe.epochs * steps_per_epoch)
        return None
    augment_batch = run.compiled(augment, "augment")
    optimizer = build_sgd(
        list(model.parameters()),
        run.device,
        lr=0.0,  # set before each step
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    if run.settings.find_batch_size:
        step = step_alone(run, recipe, augment, model, detection_loss, optimizer)
        least = fewest_images(recipe)
        batch_size = find_batch_size(
            run, step, largest_sample, train_set, len(train_set), least=least
        )
        recipe = replace(recipe, batch_size=batch_size)
        require_trainable(recipe, run)  # a resumed run's batch was not searched

    world_size = run.ranks.world_size
    steps_per_epoch = iterations_per_epoch(train_set, recipe, world_size)
    total_steps = recipe.epochs * steps_per_epoch
    progress = Progress(run, recipe, LOSSES, steps_per_epoch, total_steps, REMEDY)
    ema = run.weight_average(model)
    state = RunState(run, model, ema, optimizer, progress, recipe, train_set, val_set)
    state.restore()
    parallel_model, optimizer = run.parallel(model, optimizer)
    parallel_model.train()
    accumulation = run.accumulation(
        model,
        parallel_model,
        recipe.batch_size,
        detection_loss.normaliser,
        least=fewest_images(recipe),
    )
    if run.settings.find_lr:
        parts = (augment_batch, parallel_model, criterion, accumulation, optimizer)
        step = TrialStep(recipe, run.precision, *parts)
        return sweep_rates(run, step, build_loader, train_set, steps_per_epoch)
    loader = build_loader(
        recipe,
        train_set,
        training=True,
        ranks=run.ranks,
        workers=run.workers,
        seed=run.seed,
        start=progress.steps_done,
        end=progress.end,
        pin_memory=run.pin_memory,
    )
    reader = loader.dataset.reader
    if args.fake_input:
        loader = repeat_first_batch(loader)
    else:
        run.fill_cache(reader)

    with run.open_output(recipe, progress, train_files + val_files):
        progress.begin(len(train_set), num_classes, f"learning rate {recipe.lr:g} after warm-up")
        for warning in recipe.warnings(world_size):
            run.log.warning(warning)
        if progress.evaluation_due():  # left undone by the run that this one goes on from
            evaluate(run, recipe, progress, state, ema.model, val_set)

        for step, batch in progress.steps(loader):
            batch = batch.to(run.device)
            images, boxes = augment_batch(batch, recipe)
            set_learning_rate(optimizer, progress.lr(step))
            optimizer.zero_grad(set_to_none=True)
            for part in accumulation.parts(images, boxes, batch.labels, batch.valid):
                with run.precision.autocast():
                    outputs = parallel_model(part.images)
                losses = criterion(outputs, part.boxes, part.labels, part.valid, part.normaliser)
                run.precision.backward(losses["loss"], optimizer)
                accumulation.add(losses)
            losses = accumulation.losses
            run.precision.step(optimizer, recipe.clip_norm, recipe.clip_each)
            ema.update()
            progress.add(step, losses, batch.image_ids)
            if progress.first_epoch_done():
                run.log.warn_of("data", turned_images(reader, len(train_set), run.ranks))

            state.look_for_metrics()
            if progress.checkpoint_due():
                state.save()
            if progress.evaluation_due():
                evaluate(run, recipe, progress, state, ema.model, val_set)

        if progress.interrupted:
            state.save()
            return progress.exit_status()
        progress.finish()
        read_image = image_by_id(val_set, TURNS_IF_BOTH_FIT)
        progress.explain(model, val_set.annotation_file, val_set.class_names, read_image)
    return None


def parse(argv: list[str] | None):
    parser = flags.make_parser(
        __doc__, *flags.TRAINING_GROUPS, recipes=RECIPES, old_flags=OLD_FLAGS
    )
    parser.add_argument(
        "--pth-path", dest="checkpoint", default=SUPPRESS, help="the same as --checkpoint"
    )
    return parser.parse_args(argv)


def default_backbone(recipe: Recipe) -> list[dict]:
    """Load the port's file of ImageNet weights where it is there and fits, else nothing."""
    if recipe.backbone != "vgg16" or not PRETRAINED.is_file():
        return []
    return [load_checkpoint(PRETRAINED)]


def fewest_images(recipe: Recipe) -> int:
    """Return how many images of a process must go through the network together."""
    return 2 if recipe.anchor_maps[-1] == 1 else 1


def require_trainable(recipe: Recipe, run: Run) -> None:
    """Raise UserError where batch normalisation would see a single value a channel."""
    accumulate = run.settings.accumulate  # parts in which a batch goes through the network
    if run.settings.sync_bn and run.ranks.world_size > 1:
        return  # it sees images of several processes
    if recipe.batch_size < fewest_images(recipe) * accumulate:
        raise UserError(
            f"--batch_size={recipe.batch_size}, --accumulate={accumulate}: BN on the 1 x 1 map "
            "needs at least 2 images of a process at a time"
        )


def read_data(
    run: Run,
    recipe: Recipe,
    train_files: list[Files],
    val_files: list[Files],
    weights: list[dict],
) -> tuple[CocoIndex, CocoIndex]:
    """Return the training set and the val set; log where they are and what was noticed in them.

    The classes of a resumed run stay; those of `weights` give the order where their names are the
    same. Raise UserError for data that a run cannot be made of.
    """
    trained_order = None
    if weights:
        trained_order = named_classes(weights[-1])
    for file in [*train_files, *val_files]:
        run.log.info(f"data: {file}")
    train_set = read_records(train_files, run.resumed_classes, usual_order=trained_order)
    val_set = read_records(val_files, classes=train_set.class_names)
    for records in (train_set, val_set):
        run.log.warn_of(records.annotation_file, records.lines())
    run.log.info(trained_boxes_line(train_set, untrained_boxes(train_set, recipe)))
    if run.settings.evaluate:
        val_set.require_annotations()
    return run.subset_of(train_set), val_set


def evaluate(
    run: Run,
    recipe: Recipe,
    progress: Progress,
    state: RunState,
    model: nn.Module,
    val_set: CocoIndex,
) -> None:
    """Evaluate the network in fp32 on all ranks, log the result, and keep the best state."""
    with progress.paused():
        run.log.info(f"evaluating {len(val_set)} images")
        distributed.average_buffers(model, run.ranks)
        result_rows = detect_all(model, recipe, val_set, run.device, run.ranks, run.workers)
        state.add_evaluation(evaluate_and_save, result_rows, val_set, recipe)


if __name__ == "__main__":
    entry.run(main)
