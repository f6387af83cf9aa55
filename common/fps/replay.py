"""`--look` and `--replay`: batches of a run drawn again, with what the network learns from them.

A sample is a function of (seed, epoch, position), so any batch of a run can be had again.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from common.arithmetic import ceil_div
from common.coco.look import Sample, draw_pages
from common.errors import UserError
from common.npu.distributed import Ranks
from common.npu.run import MAY_CHANGE, Run
from common.npu.weights import load_same

OWN_NORMALISER = (
    "losses of an image are those of a batch of that image alone: divided by its own number of "
    "matches, as the model's loss.py says"
)


class Pipeline(NamedTuple):
    """The way of an image into the loss of a model: its functions of the same names."""

    recipe: Any
    train_set: Any  # as a run trains on it; it gives `path`, `class_names` and `checksum`
    build_loader: Callable
    augment: Callable
    samples_of_batch: Callable[..., list[Sample]]
    criterion: nn.Module


class DrawnBatch(NamedTuple):
    """A batch on the device, and what `augment` made of it."""

    batch: Any
    images: Tensor  # (N, 3, H, W) float32, the input of the network
    boxes: Tensor  # (N, M, 4) as the criterion takes them
    samples: list[Sample]  # without losses


def draw_batches(
    run: Run, pipeline: Pipeline, model: nn.Module, steps_per_epoch: int, total_steps: int
) -> None:
    """Do what `--look` or `--replay` asks for, and print it.

    A run on `run.drawn_world_size` ranks has these numbers of steps. Pictures are written in a
    folder beside the output folder, whose name ends in `_look`. Raise UserError where the run has
    no such step or epoch, or is not the one that the flags describe.
    """
    if run.replayed is None:
        _look(run, pipeline, steps_per_epoch, total_steps)
    else:
        _replay(run, pipeline, model, steps_per_epoch, total_steps)


def _look(run: Run, pipeline: Pipeline, steps_per_epoch: int, total_steps: int) -> None:
    """Draw the first samples of an epoch of a run on one rank."""
    epoch = run.settings.epoch
    first_step = (epoch - 1) * steps_per_epoch
    if first_step >= total_steps:
        num_epochs = ceil_div(total_steps, steps_per_epoch)
        raise UserError(
            f"--epoch {epoch}: a run of this recipe has {num_epochs} epochs", "give one of them"
        )
    print(
        f"epoch {epoch}: its first samples as the network gets them, in their order on one device"
    )
    samples = _first_samples(run, pipeline, first_step, first_step + steps_per_epoch)
    _write_pages(run, pipeline, samples, f"epoch_{epoch}")


def _first_samples(run: Run, pipeline: Pipeline, start: int, end: int) -> Iterator[Sample]:
    """Yield and print the first samples of `--look` from step `start`, from 0, up to `end`."""
    num_left = run.settings.look
    end = min(end, start + ceil_div(num_left, pipeline.recipe.batch_size))
    for drawn in _drawn_batches(run, pipeline, Ranks(), start, end):
        for sample in drawn.samples[:num_left]:
            print(sample.line(pipeline.train_set.class_names))
            yield sample
        num_left -= len(drawn.samples)


def _replay(
    run: Run, pipeline: Pipeline, model: nn.Module, steps_per_epoch: int, total_steps: int
) -> None:
    """Draw the batch of a step, of all ranks, with the losses of each image."""
    number = run.replayed.number
    if number > total_steps:
        raise UserError(f"--replay {number}: the run has {total_steps} steps", "give one of them")
    _require_same_run(run, pipeline)
    epoch = ceil_div(number, steps_per_epoch)
    print(f"step {number} (epoch {epoch}) of the run, ranks: {run.replayed.world_size}")
    print(_load_weights(run, model))
    model.train()

    samples = []
    not_finite_alone = []
    first = run.replayed.index_of_batch
    for rank in range(run.replayed.world_size):
        ranks = Ranks(rank=rank, world_size=run.replayed.world_size)
        [drawn] = _drawn_batches(run, pipeline, ranks, first, first + 1)
        of_batch, of_images = _losses(run, pipeline, model, drawn)
        terms = ", ".join(f"{name} {value:.4g}" for name, value in of_batch.items())
        print(f"rank {rank}: {len(drawn.samples)} images; losses of its batch: {terms}")
        for sample, losses in zip(drawn.samples, of_images, strict=True):
            sample = sample._replace(losses=losses)
            print(sample.line(pipeline.train_set.class_names))
            samples.append(sample)
        if not all(_are_finite(losses) for losses in of_images):
            not_finite_alone += _not_finite_alone(run, pipeline, model, drawn)

    _write_pages(run, pipeline, samples, f"step_{number}")
    print(OWN_NORMALISER)
    not_finite = [sample.image_id for sample in samples if not _are_finite(sample.losses)]
    if not not_finite:
        print("the losses of every image are finite under these weights")
        return
    print(f"losses that are not finite: images {not_finite}")
    if not_finite_alone != not_finite:
        print(
            "batch normalisation mixes the images of a batch; with its running statistics, an "
            f"image alone, these are not finite: {not_finite_alone}"
        )


def _drawn_batches(
    run: Run, pipeline: Pipeline, ranks: Ranks, start: int, end: int
) -> Iterator[DrawnBatch]:
    """Yield the batches of a rank from step `start` to `end`, from 0, with their samples."""
    loader = pipeline.build_loader(
        pipeline.recipe,
        pipeline.train_set,
        training=True,
        ranks=ranks,
        seed=run.seed,
        start=start,
        end=end,
    )
    for batch, keys in zip(loader, loader.batch_sampler, strict=True):
        batch = batch.to(run.device)
        images, boxes = pipeline.augment(batch, pipeline.recipe)
        samples = pipeline.samples_of_batch(
            images, boxes, batch, pipeline.recipe, pipeline.criterion
        )
        named_samples = []
        for sample, (_, _, record) in zip(samples, keys, strict=True):
            named_samples.append(sample._replace(file=pipeline.train_set.path(record)))
        yield DrawnBatch(batch, images, boxes, named_samples)


@torch.no_grad()
def _losses(
    run: Run, pipeline: Pipeline, model: nn.Module, drawn: DrawnBatch
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the loss terms of a batch, and those of each of its images."""
    labels = drawn.batch.labels
    valid = drawn.batch.valid
    # In the training mode an image that is not finite would spoil the running statistics.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with run.precision.autocast():
        outputs = model(drawn.images)
    model.load_state_dict(buffers, strict=False)
    of_batch = _values(pipeline.criterion(outputs, drawn.boxes, labels, valid))
    of_images = []
    for i in range(len(drawn.images)):
        image = slice(i, i + 1)
        outputs_of_image = tree_map_only(Tensor, lambda output, image=image: output[image], outputs)
        losses = pipeline.criterion(
            outputs_of_image, drawn.boxes[image], labels[image], valid[image]
        )
        of_images.append(_values(losses))
    return of_batch, of_images


@torch.no_grad()
def _not_finite_alone(
    run: Run, pipeline: Pipeline, model: nn.Module, drawn: DrawnBatch
) -> list[int]:
    """Return the ids of the images whose losses are not finite in the evaluation mode.

    In it the other images of a batch have no influence.
    """
    image_ids = []
    model.eval()
    for i, sample in enumerate(drawn.samples):
        image = slice(i, i + 1)
        with run.precision.autocast():
            outputs = model(drawn.images[image])
        losses = pipeline.criterion(
            outputs, drawn.boxes[image], drawn.batch.labels[image], drawn.batch.valid[image]
        )
        if not _are_finite(_values(losses)):
            image_ids.append(sample.image_id)
    model.train()
    return image_ids


def _are_finite(losses: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in losses.values())


def _values(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}


def _load_weights(run: Run, model: nn.Module) -> str:
    """Load the checkpoint at or before the step, if there is one; return a line that says which."""
    state = run.resumed
    if state is None:
        return (
            f"weights: no checkpoint in {run.output_dir} is of an earlier step: those that the run "
            "starts from by these flags"
        )
    load_same(model, state["model"], state["path"])
    steps_before = run.replayed.number - 1 - state["iteration"]
    if steps_before:
        return f"weights: {state['path']}, {steps_before} steps before those of the step"
    return f"weights: {state['path']}, those of the step"


def _require_same_run(run: Run, pipeline: Pipeline) -> None:
    """Raise UserError where the log or the checkpoint of the run says that it was another one."""
    differences = []
    seed = run.replayed.seed
    if seed is not None and seed != run.seed:
        differences.append(f"seed ({seed} before, {run.seed} now)")
    recorded_config = run.replayed.config
    if recorded_config is not None:
        recorded_fields = _fields(recorded_config)
        for name, value in _fields(pipeline.recipe.listing()).items():
            before = recorded_fields.get(name, value)
            has_effect = name not in MAY_CHANGE or name == "batch_size"
            if before != value and has_effect:
                differences.append(f"{name} ({before} before, {value} now)")
    if run.resumed is not None:
        name = "checksum of the training set"
        before = run.resumed_identity(name)
        now = pipeline.train_set.checksum()
        if before != now:
            differences.append(f"{name} ({before} before, {now} now)")
    if differences:
        raise UserError(
            f"--replay {run.replayed.number}: the run in {run.output_dir} was another one: "
            f"{', '.join(differences)}",
            "give the flags of that run",
        )


def _fields(listing: str) -> dict[str, str]:
    """Return the values of a recipe's `listing` by name."""
    fields = {}
    for line in listing.splitlines():
        name, _, value = line.partition(" = ")
        fields[name] = value
    return fields


def _write_pages(run: Run, pipeline: Pipeline, samples: Iterable[Sample], name: str) -> None:
    folder = run.output_dir.absolute()
    folder = folder.with_name(f"{folder.name}_look")
    paths = list(draw_pages(samples, pipeline.train_set.class_names, folder, name))
    for path in paths:
        print(f"written: {path}")
