#!/usr/bin/env python3
"""Train SSD300-ResNet34 on TFRecord files.

    python3 train.py --training_file_pattern='tfrecord/train2017*' \\
        --validation_file_pattern='tfrecord/val2017*' --val_json_file=instances_val2017.json \\
        --resnet_checkpoint=pretrain/model.ckpt-28152 --model_dir=result_npu

`--mode=train` does not evaluate. An epoch is what the schedule counts as one; the end of the
records has no meaning here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

from dataclasses import replace

from torch import nn

from common import flags
from common.coco.coverage import Presets
from common.errors import UserError
from common.fps.network_size import size_line
from common.fps.progress import Progress
from common.fps.rate_sweep import sweep_rates
from common.fps.replay import Pipeline, draw_batches
from common.npu import distributed, entry
from common.npu.batch_search import find_batch_size
from common.npu.device import memory_format
from common.npu.loading import require_memory_for_batch
from common.npu.precision import build_sgd, set_learning_rate
from common.npu.run import Run, RunState
from common.npu.trial_step import TrialStep, step_alone
from ssd_resnet34.model import backbone_stages
from ssd_resnet34.tfrecord.augment import augment
from ssd_resnet34.tfrecord.categories import find_categories, require_known_categories
from ssd_resnet34.tfrecord.check import check_data
from ssd_resnet34.tfrecord.config import EVALUATION_FOLDER, RECIPES, Recipe
from ssd_resnet34.tfrecord.coverage import MATCHING
from ssd_resnet34.tfrecord.data import (
    build_loader,
    largest_sample,
    trained_records_line,
    training_records,
)
from ssd_resnet34.tfrecord.evaluate import (
    detect_all,
    evaluate_and_save,
    validation_records,
)
from ssd_resnet34.tfrecord.index import RecordIndex, read_index
from ssd_resnet34.tfrecord.look import samples_of_batch
from ssd_resnet34.tfrecord.loss import DetectionLoss, decay_term
from ssd_resnet34.tfrecord.model import build_model
from ssd_resnet34.tfrecord.options import parse, require_files, require_ranks
from ssd_resnet34.tfrecord.port_lines import PortLines
from ssd_resnet34.tfrecord.weights import (
    load_weights,
    read_weights,
    recipe_of_checkpoint,
    trained_classes,
)

LOSSES = ("loss_cls", "loss_bbox", "loss")
REMEDY = "lower --lr, clip with --clip_norm=10, use --loss_scale=dynamic, or see --check_data"
RESUME_REMEDY = "start anew in another --model_dir, from its weights with --resnet_checkpoint"


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv, __doc__)
    recipe = flags.chosen_recipe(args, RECIPES)
    category_ids = None
    if hasattr(args, "category_ids"):  # the flag was given
        category_ids = recipe.category_ids
    if args.check_data:
        return check_data(
            args.training_file_pattern,
            args.validation_file_pattern,
            args.val_json_file,
            category_ids,
            args.output_dir,
            Presets(args.recipe, recipe, RECIPES, MATCHING),
        )
    if args.mode == "eval":
        raise UserError(
            "--mode=eval: train.py does not evaluate; use tfrecord/evaluate.py or ssd_main.py"
        )
    if hasattr(args, "benchmark"):
        raise UserError(
            "--benchmark: train.py does not measure a trained detector",
            "use tfrecord/evaluate.py, or ssd_main.py with --mode=eval",
        )
    require_files(args, args.mode)
    require_ranks()

    # All that the run needs is read and built first. A former run's folder is moved only after
    # that, by `open_output`: a run that is refused changes nothing.
    run = Run.start(args, recipe, card=args.card, weights_flag="--resnet_checkpoint")
    recipe = replace(recipe, amp=run.precision.level)  # on a CPU it may be another one
    weights = None
    trained = run.resumed
    if run.resumed is None and args.resnet_checkpoint:
        weights = read_weights(args.resnet_checkpoint)
        trained = weights
    if trained is not None:
        requested = recipe
        network = recipe_of_checkpoint(requested, trained)
        recipe = replace(network, category_ids=requested.category_ids)  # those of the records
        recipe = flags.require_agreement(args, recipe, trained)
        run.log_network_change(trained, requested, recipe)
    world_size = run.ranks.world_size
    if not run.settings.find_batch_size:
        require_one_step(recipe, world_size)
    trained_order = None
    if weights is not None:
        trained_order = trained_classes(weights)
    train_set = read_training_records(
        run, args.training_file_pattern, category_ids, args.val_json_file, trained_order
    )
    recipe = replace(recipe, category_ids=train_set.category_ids)
    val_set = train_set  # RunState only needs the category ids
    if run.settings.evaluate:
        val_set = read_index(args.validation_file_pattern, "--validation_file_pattern")
        val_set = replace(
            val_set, category_ids=train_set.category_ids, class_names=train_set.class_names
        )
        val_set, notes = validation_records(val_set, args.val_json_file)
        run.log.warn_of(args.val_json_file, notes)

    canvas = (recipe.image_size, recipe.image_size)
    require_memory_for_batch(recipe.batch_size, canvas, run.ranks, run.device)
    num_classes = len(recipe.category_ids)
    model = build_model(recipe, num_classes)
    if weights is not None:
        report = load_weights(model, weights, train_set.class_names)
        run.log.info(f"{args.resnet_checkpoint}: {report}")
    elif not run.resumed:
        run.log.warning("weights: random; --resnet_checkpoint gives the backbone's")
    run.freeze(model, backbone_stages(model), has_weights=trained is not None)
    run.synchronise_norms(model)
    if run.ranks.main and not run.only_draws:
        run.log.info(size_line(model, recipe.image_size, recipe.image_size))
    model.to(run.device, memory_format=memory_format(run.device))
    detection_loss = DetectionLoss(recipe, num_classes).to(run.device)
    criterion = run.compiled(detection_loss, "loss")
    if run.only_draws:
        pipeline = Pipeline(recipe, train_set, build_loader, augment, samples_of_batch, criterion)
        steps_per_epoch = recipe.iters_per_epoch(run.drawn_world_size)
        total_steps = recipe.total_steps(run.drawn_world_size)
        draw_batches(run, pipeline, model, steps_per_epoch, total_steps)
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
        num_images = min(len(train_set), recipe.num_examples_per_epoch)
        batch_size = find_batch_size(run, step, largest_sample, train_set, num_images)
        recipe = replace(recipe, batch_size=batch_size)
        require_one_step(recipe, world_size)  # a resumed run's batch was not searched

    steps_per_epoch = recipe.iters_per_epoch(world_size)
    total_steps = recipe.total_steps(world_size)
    progress = Progress(
        run, recipe, LOSSES, steps_per_epoch, total_steps, REMEDY, log_period=total_steps
    )
    ema = run.weight_average(model)
    state = RunState(
        run, model, ema, optimizer, progress, recipe, train_set, val_set, remedy=RESUME_REMEDY
    )
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
    run.fill_cache(loader.dataset.reader)
    port_lines = PortLines(progress, run.device)

    with run.open_output(recipe, progress):
        base_lr = recipe.base_lr(world_size, recipe.batch_size)
        progress.begin(len(train_set), num_classes, f"base learning rate {base_lr:g}")
        if progress.evaluation_due():  # left undone by the run that this one goes on from
            evaluate(run, recipe, progress, state, ema.model, val_set, args.val_json_file)

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
            if progress.log_due(step + 1):
                decay = decay_term(model.parameters(), recipe.weight_decay)
                port_lines.add(step, losses["loss"] + decay, batch.image_ids)
            run.precision.step(optimizer, recipe.clip_norm)
            ema.update()
            progress.add(step, losses, batch.image_ids)
            port_lines.print_logged()

            state.look_for_metrics()
            if progress.checkpoint_due():
                state.save()
                port_lines.print_logged()
            if progress.evaluation_due():
                evaluate(run, recipe, progress, state, ema.model, val_set, args.val_json_file)

        if progress.interrupted:
            state.save()
            return progress.exit_status()
        progress.finish()
        progress.explain(
            model,
            args.val_json_file,
            val_set.class_names,
            val_set.image_by_id,
            run.output_dir / EVALUATION_FOLDER,
        )
        port_lines.print_logged()
    return None


def require_one_step(recipe: Recipe, world_size: int) -> None:
    """Raise UserError where an epoch has fewer images than a step of all ranks."""
    if recipe.iters_per_epoch(world_size) < 1:
        raise UserError("--num_examples_per_epoch is less than one step's images; give more")


def read_training_records(
    run: Run,
    pattern: str,
    category_ids: tuple[int, ...] | None,
    val_json_file: str,
    trained_order: tuple[str, ...] | None,
) -> RecordIndex:
    """Return the records to train on, and log how many boxes they have.

    `category_ids` are those of the flag, None where it is not given. `trained_order` has the class
    names of the weights, which give the order where they are the same. Raise UserError for records
    that a run cannot be made of.
    """
    records = read_index(pattern, "--training_file_pattern")
    run.log.info(trained_records_line(records))
    categories = find_categories(category_ids, run.resumed, val_json_file, records, trained_order)
    if not categories.are_cocos:
        run.log.info(categories.line())
    records = categories.of(records)
    require_known_categories(records)
    return run.subset_of(training_records(records))


def evaluate(
    run: Run,
    recipe: Recipe,
    progress: Progress,
    state: RunState,
    model: nn.Module,
    val_set: RecordIndex,
    val_json_file: str,
) -> None:
    """Evaluate the network in fp32 on all ranks, log the result, and keep the best state."""
    with progress.paused():
        run.log.info(f"evaluating {len(val_set)} images")
        distributed.average_buffers(model, run.ranks)
        result_rows = detect_all(model, recipe, val_set, run.device, run.ranks, run.workers)
        state.add_evaluation(evaluate_and_save, result_rows, val_set, val_json_file)


if __name__ == "__main__":
    entry.run(main)
