#!/usr/bin/env python3
"""The training step of m2det: time, memory, and what computing the leach module once saves.

The published code computes it anew for each of the 8 levels, on the same input. Both networks are
first checked to give the same outputs and running statistics. Memory is what the forward pass keeps
for the backward pass, counted tensor by tensor, so that it is the same on every device.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

from collections.abc import Callable

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import default_collate

from benchmarks.m2det.reference import ReferenceM2Det
from benchmarks.steps import LR, arguments, clock, placed, precisions, synchronize
from benchmarks.timing import print_table, race, ratio
from common.npu.device import in_host_memory, memory_mib, setup_device
from common.npu.precision import Precision, build_sgd
from m2det.augment import augment
from m2det.config import RECIPES, Recipe
from m2det.data import Batch, TrainingSet, find_files, read_records
from m2det.loss import DetectionLoss
from m2det.model import M2Det

CLASSES = 80
OURS = "ours: leach once"
ORIGINAL = "leach 8 times"
NETWORKS = {OURS: M2Det, ORIGINAL: ReferenceM2Det}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device, reason = setup_device(args.device)
    print(reason)

    recipe = RECIPES[args.recipe]
    batch = first_batch(args.data, recipe, args.batch_size)
    models = {}
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        models[name] = placed(network(recipe, CLASSES), device)
    require_equal(models, recipe)

    rows = []
    for precision_name, precision in precisions(device).items():
        steps = {}
        leaches = {}
        for name, model in models.items():
            steps[name] = our_step(model, recipe, batch, precision)
            leaches[name] = leach_step(model, recipe, args.batch_size, precision)
        for what, peers in (("step", steps), ("base feature to leach and back", leaches)):
            times = race(peers, args.rounds)
            original_seconds = clock(times[ORIGINAL], device)
            for name, model in models.items():
                seconds = clock(times[name], device)
                memory = ""
                if what == "step":
                    memory = f"{kept_bytes(model, recipe, batch, precision) >> 20}"
                milliseconds = 1e3 * np.median(seconds) / args.batch_size
                speed = ratio(original_seconds, seconds)
                cells = (what, name, precision_name, f"{milliseconds:.0f}", f"{speed:.2f}", memory)
                rows.append(cells)
    unit = "CPU ms" if in_host_memory(device) else "ms"
    header = (
        "",
        "",
        "precision",
        f"{unit} an image",
        "speed, 8 times = 1",
        "MiB kept for backward",
    )
    title = f"Training step, {args.recipe}, on {device.type}, batch {args.batch_size}"
    print_table(title, header, rows)
    print(f"Peak memory of it all: {memory_mib(device)} MiB.\n")


def parse() -> argparse.Namespace:
    parser = arguments(__doc__.split("\n")[0], batch_size=1)
    parser.add_argument("--recipe", default="512_vgg", choices=RECIPES)
    return parser.parse_args()


def first_batch(data_path: str, recipe: Recipe, batch_size: int) -> Batch:
    """Return a batch of the first images of the training set."""
    records = read_records(find_files(data_path, "train"))
    dataset = TrainingSet(records, recipe, seed=0)
    samples = []
    for position in range(batch_size):
        samples.append(dataset[0, position, position % len(dataset)])
    return default_collate(samples)


def uses_of_leach(model: M2Det) -> int:
    """Return how often the network computes the leach module in a step."""
    return model.num_levels if isinstance(model, ReferenceM2Det) else 1


def require_equal(models: dict[str, M2Det], recipe: Recipe) -> None:
    """Raise AssertionError unless the same base feature leads to the same map and statistics."""
    results = []
    for model in models.values():
        leach = model.leach[0]
        torch.manual_seed(1)
        base = torch.randn(2, 3 * recipe.planes, 8, 8).to(next(model.parameters()).device)
        for _ in range(uses_of_leach(model)):
            leached = leach(base)
        results.append((leached, leach.bn.running_mean, leach.bn.running_var))
    for ours_value, original_value in zip(*results, strict=True):
        torch.testing.assert_close(ours_value, original_value, rtol=1e-4, atol=1e-5)


def kept_bytes(model: M2Det, recipe: Recipe, batch: Batch, precision: Precision) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, _ = augment(batch.to(precision.device), recipe)
    with saved_tensors_hooks(keep, lambda tensor: tensor), precision.autocast():
        outputs = model(images)
    del outputs
    return sum(kept.values())


def our_step(
    model: M2Det, recipe: Recipe, batch: Batch, precision: Precision
) -> Callable[[], None]:
    """Return a training step as train.py makes it, which reads the loss at its end."""
    device = precision.device
    model.zero_grad(set_to_none=True)
    optimizer = build_sgd(
        list(model.parameters()),
        device,
        lr=LR,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    criterion = DetectionLoss(recipe, CLASSES).to(device)

    def run() -> None:
        moved = batch.to(device)
        images, boxes = augment(moved, recipe)
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            outputs = model(images)
        losses = criterion(outputs, boxes, moved.labels, moved.valid)
        precision.backward(losses["loss"], optimizer)
        precision.step(optimizer, recipe.clip_norm, recipe.clip_each)
        assert np.isfinite(losses["loss"].item()), losses

    return run


def leach_step(
    model: M2Det, recipe: Recipe, batch_size: int, precision: Precision
) -> Callable[[], None]:
    """Return the leach module alone, as often as the network runs it, forward and backward."""
    side = recipe.anchor_maps[0]
    base = torch.randn(batch_size, 3 * recipe.planes, side, side, device=precision.device)
    base = base.contiguous(memory_format=torch.channels_last).requires_grad_()
    leach = model.leach[0]
    uses = uses_of_leach(model)

    def run() -> None:
        total = 0
        with precision.autocast():
            for _ in range(uses):
                total = total + leach(base).sum()
        torch.autograd.grad(total, [base, *leach.parameters()])
        synchronize(precision.device)

    return run


if __name__ == "__main__":
    main()
