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
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import default_collate

from benchmarks.m2det.reference import ReferenceM2Det
from benchmarks.steps import arguments, clock, our_step, placed, precisions, synchronize
from benchmarks.timing import print_table, race, ratio
from common.npu.device import memory_mib, setup_device
from common.npu.precision import Precision, build_sgd
from m2det import train
from m2det.augment import augment
from m2det.config import RECIPES, Recipe
from m2det.data import Batch, TrainingSet, find_files, read_records
from m2det.model import M2Det

NETWORKS = {"ours: leach once": M2Det, "leach 8 times": ReferenceM2Det}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device, why = setup_device(args.device)
    print(why)

    recipe = RECIPES[args.recipe]
    records = read_records(find_files(args.data, "train"))
    samples = TrainingSet(records, recipe, seed=0)
    batch = default_collate([samples[0, k, k % len(samples)] for k in range(args.batch_size)])
    rows = []
    models = {who: network(kind, recipe, device) for who, kind in NETWORKS.items()}
    check(models, recipe)
    for name, precision in precisions(device).items():
        kept = {who: saved(model, recipe, batch, precision) for who, model in models.items()}
        for what, make in (("step", step), ("base feature to leach and back", leach)):
            peers = {who: make(model, recipe, batch, precision) for who, model in models.items()}
            times = {who: clock(t, device) for who, t in race(peers, args.rounds).items()}
            for who, seconds in times.items():
                milliseconds = 1e3 * np.median(seconds) / args.batch_size
                against = ratio(times["leach 8 times"], seconds)
                memory = f"{kept[who] >> 20}" if what == "step" else ""
                rows.append((what, who, name, f"{milliseconds:.0f}", f"{against:.2f}", memory))
    unit = "CPU ms" if device.type == "cpu" else "ms"
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


def network(kind: type[M2Det], recipe: Recipe, device: torch.device) -> M2Det:
    torch.manual_seed(0)
    return placed(kind(recipe, 80), device)


def check(models: dict[str, M2Det], recipe: Recipe) -> None:
    """One pass over a random base feature: same leached map and running statistics."""
    statistics = []
    for model in models.values():
        module = model.leach[0]
        torch.manual_seed(1)
        base = torch.randn(2, 3 * recipe.planes, 8, 8).to(next(model.parameters()).device)
        uses = 1 if type(model) is M2Det else model.levels
        made = [module(base) for _ in range(uses)][-1]
        statistics.append((made, module.bn.running_mean, module.bn.running_var))
    for mine, theirs in zip(*statistics, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def saved(model: M2Det, recipe: Recipe, batch: Batch, precision: Precision) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights left out."""
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


def step(model: M2Det, recipe: Recipe, batch: Batch, precision: Precision) -> Callable[[], None]:
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    model.zero_grad(set_to_none=True)
    optimizer = build_sgd(list(model.parameters()), precision.device, lr=0.0, **options)
    return our_step(train, recipe, model, optimizer, batch, precision)


def leach(model: M2Det, recipe: Recipe, batch: Batch, precision: Precision) -> Callable[[], None]:
    """The leach module alone, as often as the network runs it, forward and backward."""
    side, device = recipe.prior_maps[0], precision.device
    base = torch.randn(len(batch.images), 3 * recipe.planes, side, side, device=device)
    base = base.contiguous(memory_format=torch.channels_last).requires_grad_()
    uses: list[nn.Module] = list(model.leach)[: 1 if type(model) is M2Det else None]

    def run() -> None:
        with precision.autocast():
            total = sum(module(base).sum() for module in uses)
        torch.autograd.grad(total, [base, *uses[0].parameters()])
        synchronize(device)

    return run


if __name__ == "__main__":
    main()
