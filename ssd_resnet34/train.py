#!/usr/bin/env python3
"""Train SSD300-ResNet34 on COCO or on any COCO-format data set.

    python3 train.py --data DIR                                        one device
    python3 ../common/npu/launch.py --nproc_per_node=8 train.py --recipe 8p --data DIR
    ... --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --local_addr=10.0.0.1    several nodes

Recipe (MLPerf v0.7, Ascend port): SGD, step decay, batch 32 a device, 90 epochs, AP 0.23.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

from dataclasses import replace

from torch import nn

from common import flags
from common.coco.check import check_data
from common.coco.coverage import Presets
from common.coco.index import CocoIndex, read_index
from common.coco.layout import Files, find_coco
from common.coco.report import image_by_id, turned_images
from common.coco.sampling import balance_line
from common.coco.trained import trained_boxes_line
from common.fps.network_size import size_line
from common.fps.progress import Progress
from common.fps.rate_sweep import sweep_rates
from common.fps.replay import Pipeline, draw_batches
from common.npu import distributed, entry
from common.npu.batch_search import find_batch_size
from common.npu.device import memory_format
from common.npu.loading import repeat_first_batch, require_memory_for_batch
from common.npu.precision import build_sgd, set_learning_rate
from common.npu.run import Run, RunState
from common.npu.trial_step import TrialStep, step_alone
from common.npu.weights import named_classes
from ssd_resnet34.augment import augment
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.coverage import MATCHING
from ssd_resnet34.data import (
    TURNS_IF_BOTH_FIT,
    build_loader,
    iterations_per_epoch,
    largest_sample,
    training_records,
    untrained_boxes,
)
from ssd_resnet34.evaluate import detect_all, evaluate_and_save
from ssd_resnet34.look import samples_of_batch
from ssd_resnet34.loss import DetectionLoss
from ssd_resnet34.model import backbone_stages, build_model
from ssd_resnet34.old_flags import OLD_FLAGS
from ssd_resnet34.weights import load_weights, recipe_of_checkpoint

LOSSES = ("loss_cls", "loss_bbox", "loss")
REMEDY = (
    "lower --lr (with --lr_step=0), clip with --clip_norm=10, use --loss_scale=dynamic, or see "
    "--check_data"
)


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv)
    recipe = flags.chosen_recipe(args, RECIPES)
    train_files = find_coco(args.data, "train", args.train_annotations, args.train_images)
    val_files = find_coco(args.data, "val", args.val_annotations, args.val_images)
    if args.check_data:
        return check_data(
            [train_files],
            [val_files],
            untrained_boxes,
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
        trained = weights
    else:
        weights = []
        trained = [run.resumed]
    for checkpoint in trained:
        requested = recipe
        recipe = recipe_of_checkpoint(requested, checkpoint)
        recipe = flags.require_agreement(args, recipe, checkpoint)
        run.log_network_change(checkpoint, requested, recipe)
    train_set, val_set = read_data(run, train_files, val_files, weights)
    num_classes = len(train_set.class_names)
    flags.check_num_classes(args, num_classes)
    if recipe.balance:
        run.log.info(balance_line(train_set, recipe.balance))
    canvas = (recipe.image_size, recipe.image_size)
    require_memory_for_batch(recipe.batch_size, canvas, run.ranks, run.device)

    model = build_model(recipe, num_classes)
    for checkpoint in weights:
        report = load_weights(model, checkpoint, train_set.class_names)
        run.log.info(f"{checkpoint['path']}: {report}")
    if not weights and run.resumed is None:
        run.log.info("weights: random; for --pretrained: bash download_weights.sh ssd_resnet34")
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
        batch_size = find_batch_size(run, step, largest_sample, train_set, len(train_set))
        recipe = replace(recipe, batch_size=batch_size)

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
        model, parallel_model, recipe.batch_size, detection_loss.normaliser
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

    with run.open_output(recipe, progress, (train_files, val_files)):
        base_lr = recipe.base_lr(world_size, recipe.batch_size)
        progress.begin(len(train_set), num_classes, f"base learning rate {base_lr:g}")
        log_rounding(run, recipe)
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
            run.precision.step(optimizer, recipe.clip_norm)
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
    return parser.parse_args(argv)


def log_rounding(run: Run, recipe: Recipe) -> None:
    """Log the learning rate before it is rounded, where that changes it."""
    world_size = run.ranks.world_size
    exact = replace(recipe, lr_step=0.0).base_lr(world_size, recipe.batch_size)
    if exact != recipe.base_lr(world_size, recipe.batch_size):
        run.log.info(f"the rate before rounding: {exact:g}; --lr_step=0 takes it as it is")


def read_data(
    run: Run, train_files: Files, val_files: Files, weights: list[dict]
) -> tuple[CocoIndex, CocoIndex]:
    """Return the training set and the val set; log where they are and what was noticed in them.

    The classes of a resumed run stay; those of `weights` give the order where their names are the
    same. Raise UserError for data that a run cannot be made of.
    """
    trained_order = None
    if weights:
        trained_order = named_classes(weights[-1])
    for files in (train_files, val_files):
        run.log.info(f"data: {files}")
    index = read_index(
        train_files.annotation_file,
        train_files.image_dir,
        classes=run.resumed_classes,
        usual_order=trained_order,
    )
    val_set = read_index(val_files.annotation_file, val_files.image_dir, classes=index.class_names)
    for records in (index, val_set):
        run.log.warn_of(records.annotation_file, records.lines())
    run.log.info(trained_boxes_line(index, untrained_boxes(index)))
    if run.settings.evaluate:
        val_set.require_annotations()
    return run.subset_of(training_records(index)), val_set


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
