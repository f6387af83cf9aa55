#!/usr/bin/env python3
"""Train FCOS R50-caffe-FPN on COCO or on any COCO-format data set.

    python3 train.py --data DIR --pretrained resnet50_caffe-788b5fa3.pth         one device
    python3 -m torch.distributed.launch --use_env --nproc_per_node=8 train.py --data DIR ...
    ... --nnodes=2 --node_rank=0 --master_addr=10.0.0.1                          several nodes

Recipe (MMDetection 2.x): SGD, 0.01 for 16 images a step, 12 epochs; `--recipe nogn` is the port's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: F401 before torch

# isort: split

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from common.coco import check
from common.coco.index import CocoIndex, find_coco, read_index
from common.errors import UserError, one_line
from common.fps.curves import draw_curves
from common.fps.meter import Meter
from common.fps.runlog import RunLog
from common.fps.summary import write_summary
from common.fps.window import LossWindow
from common.npu import checkpoint, cli, distributed, entry
from common.npu.device import (
    be_deterministic,
    environment,
    memory_format,
    memory_mib,
    setup_device,
)
from common.npu.distributed import Ranks
from common.npu.precision import Precision, build_sgd, default_level
from fcos import snapshot
from fcos.augment import augment
from fcos.config import RECIPES, Recipe
from fcos.data import Batch, build_loader, iterations_per_epoch, training_records
from fcos.evaluate import assess, detect_all
from fcos.loss import DetectionLoss
from fcos.model import build_model, param_groups
from fcos.weights import load_weights, mean_of

LOSSES = ("loss_cls", "loss_bbox", "loss_centerness", "loss")


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv)
    recipe = cli.chosen_recipe(args, RECIPES)
    train_files = find_coco(args.data, "train", args.train_annotations, args.train_images)
    val_files = find_coco(args.data, "val", args.val_annotations, args.val_images)
    if args.check_data:
        return check.check_data(train_files, val_files)

    ranks = Ranks.from_environment()
    device, why = setup_device(args.device, ranks.card(args.device_id))
    distributed.start(device, ranks, args.timeout)
    stop = entry.StopRequest()
    torch.manual_seed(args.seed)
    if args.deterministic:
        be_deterministic(device)
    level = getattr(args, "amp", None) or default_level(device, recipe.amp)
    precision = Precision(device, level, recipe.loss_scale, args.amp_dtype, args.amp_backend)

    # Read before the output folder makes room: they may lie in it.
    resumed = checkpoint.to_resume(args.resume, args.output_dir) if ranks.main else None
    resumed = ranks.from_main(resumed)
    given = [path for path in (args.pretrained, args.checkpoint) if path and not resumed]
    weights = [checkpoint.load(path) for path in given]
    if args.recipe == "finetune" and not (weights or resumed):
        weights = [cli.checkpoint_to_use(args, ranks)]
    ranks.barrier()
    moved = checkpoint.make_room(args.output_dir, resumed is not None) if ranks.main else None
    ranks.barrier()
    workers = cli.workers_for(args, ranks.local_world_size)
    with RunLog(args.output_dir, ranks, args.device_id, workers) as log:
        log.header(
            env_info=environment(),
            config=recipe.listing(),
            seed=args.seed,
            exp_name=f"{args.tag}{recipe.name}",
        )
        for line in filter(None, (moved, why, f"precision: {precision}")):
            log.info(line)
        classes = resumed["classes"] if resumed else None
        train_set = training_records(read(train_files, classes, log))
        val_set = read(val_files, train_set.class_names, log)
        cli.check_num_classes(args, len(train_set.class_names))

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
        status = training.run(iter(repeated(loader) if args.fake_input else loader), stop)
        if status is None:
            training.finish()
    return status


def parse(argv: list[str] | None):
    groups = ("data", "files", "run", "evaluation", "device", "process")
    return cli.parser(__doc__.split("\n")[0], *groups, recipes=RECIPES).parse_args(argv)


def read(files: tuple[str, str], classes: tuple[str, ...] | None, log: RunLog) -> CocoIndex:
    """The index of an annotation file; what was noticed about it goes to the log."""
    index = read_index(*files, classes)
    for line in index.lines():
        log.info(f"{files[0]}: {line}", "WARNING")
    return index


def repeated(loader) -> Iterator[Batch]:
    """The first batch again and again."""
    batch = next(iter(loader))
    for _ in range(len(loader)):
        yield batch


class Training:
    """A run's state, and the parts of its loop."""

    def __init__(
        self,
        args,
        recipe: Recipe,
        device: torch.device,
        ranks: Ranks,
        precision: Precision,
        log: RunLog,
        train_set: CocoIndex,
        val_set: CocoIndex,
        resumed: dict | None = None,
        weights: Sequence[dict] = (),
    ):
        for state in filter(None, (*weights, resumed)):
            recipe = replace(recipe, mean=mean_of(state) or recipe.mean)
        self.args, self.recipe, self.device, self.ranks = args, recipe, device, ranks
        self.precision, self.log, self.val_set = precision, log, val_set
        self.classes, self.records = train_set.class_names, len(train_set)
        self.per_epoch = iterations_per_epoch(train_set, recipe.batch_size, ranks.world_size)
        self.end = min(recipe.epochs * self.per_epoch, args.max_iters or sys.maxsize)
        self.log_interval = max(1, min(args.log_interval, self.per_epoch // 2, self.end // 2))
        self.iteration, self.evaluated = 0, -1
        self.best, self.accuracy = -1.0, -1.0
        self.pending = None  # what a log line needs, on its way from the device
        self.logged_losses: list[float] = []
        self.terms = (*LOSSES, "grad_norm") if recipe.clip_norm else LOSSES

        self.model = build_model(recipe, len(self.classes))
        for state in weights:
            log.info(f"{state['path']}: {load_weights(self.model, state)}")
        self.frozen = resumed["run"]["backbone frozen"] if resumed else bool(weights)
        if self.frozen:
            self.model.backbone.freeze()
        else:
            log.info("weights: random: nothing is frozen, batch norm trains; give --pretrained")
        self.model.to(device, memory_format=memory_format(device))
        options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        self.optimizer = build_sgd(param_groups(self.model, recipe), device, lr=0.0, **options)
        self.window = LossWindow(self.terms, device)
        if resumed is not None:
            snapshot.restore(self, resumed)
            log.info(f"resumed from {resumed['path']} at iteration {self.iteration}")
        self.network, self.optimizer = precision.prepare(self.model, self.optimizer)
        if ranks.world_size > 1:
            self.network = distributed.parallel(self.network, precision.reduce_dtype)
        self.network.train()
        self.criterion = DetectionLoss(recipe, len(self.classes)).to(device)
        self.meter = Meter(recipe.batch_size * ranks.world_size)

    def plan(self) -> str:
        """What is about to happen, with the rate for the real global batch."""
        batch, world = self.recipe.batch_size, self.ranks.world_size
        return (
            f"{self.records} images, {len(self.classes)} classes; global batch {batch * world} "
            f"({world} x {batch}): base learning rate {self.recipe.base_lr(world, batch):g}; "
            f"{self.per_epoch} iterations an epoch, steps {self.iteration} to {self.end}; "
            f"{self.meter.formula}"
        )

    def run(self, batches: Iterator[Batch], stop: entry.StopRequest) -> int | None:
        """All steps; an exit status if a signal ended it. Bad data ends it with its UserError.

        Either way all ranks leave at the same step, with a checkpoint of it.
        """
        self.log.begin(self.end, self.iteration, self.per_epoch)
        while self.iteration < self.end:
            if self.due() and self.evaluate():
                break
            asked, batch, trouble = time.perf_counter(), None, None
            try:
                batch = next(batches)
            except UserError as error:
                trouble = error
            waited = time.perf_counter() - asked
            if stop.agreed(self.ranks, also=trouble is not None):
                self.save()
                # Every rank raises what one has met: whichever ends first tells it.
                for message in self.ranks.all_gather_objects(trouble and one_line(trouble)):
                    if message is not None:
                        raise UserError(message)
                return stop.status
            self.step(batch)
            self.report()  # of an earlier step: an accelerator has this one to do meanwhile
            self.meter.step(waited)
            self.log.bar.update()
            done = (self.iteration - 1) % self.per_epoch + 1  # steps of this epoch
            if done % self.log_interval == 0:
                self.pending = (self.iteration, self.window.fetch())
                self.window = LossWindow(self.terms, self.device)
                if self.device.type == "cpu":
                    self.report()
            whole = self.iteration % (self.args.save_interval or self.per_epoch) == 0
            if self.iteration < self.end and (whole or self.due()):
                self.save()
        return None

    def due(self) -> bool:
        """Whether an evaluation is wanted here and not done. The state is saved before: a run that
        ends in its evaluation begins there again."""
        epoch = self.iteration / self.per_epoch
        wanted = self.iteration == self.end or epoch in self.recipe.evaluation
        return wanted and self.args.kind == "acc" and self.evaluated != self.iteration

    def step(self, batch: Batch) -> None:
        """One update. Nothing in it waits for the device or has a shape that depends on data."""
        batch = batch.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.iteration) * group["lr_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        images, boxes = augment(batch, self.recipe)
        with self.precision.autocast():
            outputs = self.network(images)
        losses = self.criterion(outputs, boxes, batch.labels, batch.valid)
        self.precision.backward(losses["loss"], self.optimizer)
        norm = self.precision.step(self.optimizer, self.recipe.clip_norm)
        if norm is not None:
            # A dynamic scale that overflowed skips its step: no reason to stop, no number to log.
            losses["grad_norm"] = torch.where(norm.isfinite(), norm, 0.0)
        self.window.add(self.iteration, losses, batch.image_ids)
        self.iteration += 1

    def lr(self, iteration: int) -> float:
        batch_size, world_size = self.recipe.batch_size, self.ranks.world_size
        return self.recipe.lr_at(iteration, self.per_epoch, world_size, batch_size)

    def report(self) -> None:
        """Write the pending log line, if there is one: losses are means over window and ranks."""
        if self.pending is None:
            return
        iteration, window = self.pending
        self.pending = None
        self.demand_finite(window.bad())
        gathered = self.ranks.all_gather_objects(window.means())
        losses = {name: sum(m[name] for m in gathered) / len(gathered) for name in self.terms}
        self.logged_losses.append(losses["loss"])
        lr, memory = self.lr(iteration - 1), memory_mib(self.device)
        self.log.train(iteration, lr, losses, self.meter.window(), memory)

    def demand_finite(self, bad: tuple[int, str, list[int]] | None) -> None:
        """Stop all ranks where one of them met a loss that is not finite."""
        of_ranks = self.ranks.all_gather_objects(bad)
        found = [(bad[0], rank) for rank, bad in enumerate(of_ranks) if bad is not None]
        if not found:
            return
        step, rank = min(found)
        _, term, image_ids = of_ranks[rank]
        kept = checkpoint.by_age(self.args.output_dir)
        raise UserError(
            f"{term} is not finite, first at iteration {step} (epoch "
            f"{step // self.per_epoch + 1}) on rank {rank}, learning rate {self.lr(step):g}, "
            f"images {image_ids}; last good checkpoint: {kept[0] if kept else 'none'}; "
            "lower --lr, clip with --clip_norm=10, use --loss_scale=dynamic, or see --check_data"
        )

    def evaluate(self) -> bool:
        """COCO evaluation on all ranks, in fp32; whether the goal is reached."""
        self.report()
        self.evaluated = self.iteration
        self.log.info(f"evaluating {len(self.val_set)} images")
        with self.meter.paused():
            distributed.average_buffers(self.model, self.ranks)
            shared = (self.device, self.ranks, self.log.num_workers)
            rows = detect_all(self.model, self.recipe, self.val_set, *shared)
            if rows is not None:
                outcome = assess(rows, self.val_set, self.recipe, self.args, self.log.info)
                self.log.val(self.iteration, self.lr(self.iteration - 1), outcome.mmdet())
                self.accuracy = outcome.stats["AP"]
            self.accuracy = self.ranks.all_gather_objects(self.accuracy)[0]
            if self.accuracy > self.best:
                self.best = self.accuracy
                self.save("best.pt")
        reached = 0 < self.recipe.threshold <= self.accuracy
        if reached:
            self.log.info(f"AP goal {self.recipe.threshold:g} reached: training ends here")
        return reached

    def save(self, name: str | None = None) -> None:
        """Write the whole state, `iter_<n>.pt` or `name`; never one that is not finite."""
        self.report()
        with self.meter.paused():
            self.demand_finite(self.window.fetch().bad())
            if not self.args.save:
                return
            state = snapshot.take(self)
            if state is not None:
                path = self.args.output_dir / (name or f"iter_{self.iteration}.pt")
                checkpoint.save(path, state)
                checkpoint.tidy(path.parent, self.iteration, self.args.keep)
                self.log.info(f"Saving checkpoint {path}")
            self.ranks.barrier()

    def finish(self) -> None:
        """Save and evaluate the last state, write the summary, draw the curves."""
        self.report()
        self.save()
        if self.due():
            self.evaluate()
        self.log.info(self.meter.formula)
        folder = self.args.output_dir
        if not self.logged_losses and any(folder.glob(f"*p_{self.args.kind}.log")):
            self.log.info("nothing was left to log: curves and summary stay as they were")
        elif self.ranks.main:
            lines = write_summary(
                folder,
                (self.recipe.name, self.recipe.batch_size, self.ranks.world_size, self.args.kind),
                seconds=time.time() - self.args.started,
                fps=self.meter.fps_average if self.logged_losses else None,
                accuracy=self.accuracy if self.args.kind == "acc" else None,
                losses=self.logged_losses,
            )
            self.log.info("\n".join(lines))
            draw_curves(sorted(folder.glob("*.log.json")), folder / "curves.png")


if __name__ == "__main__":
    entry.run(main)
