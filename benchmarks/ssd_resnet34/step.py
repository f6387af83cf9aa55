#!/usr/bin/env python3
"""The training step of ssd_resnet34 against its own network, and against torchvision's SSD300.

The network alone is forward, backward of the outputs' sum, and SGD. The step is the one of
train.py, with its loss terms fetched after each step, as for a log line; with and without colour
and flip. torchvision's nearest detector is ssd300_vgg16: another trunk, so its row says how a user
of either fares, not which loss is better.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import default_collate
from torchvision.models.detection import ssd300_vgg16

from benchmarks.steps import (
    LR,
    arguments,
    our_step,
    placed,
    precisions,
    synchronize,
    torchvision_step,
)
from benchmarks.timing import print_table, race, ratio
from common.coco.index import find_coco, read_index
from common.npu.device import setup_device
from common.npu.precision import Precision, build_sgd
from ssd_resnet34 import train
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.data import Batch, TrainingSet, normalise, training_records
from ssd_resnet34.model import build_model


def main() -> None:
    args = arguments(__doc__.split("\n")[0], batch_size=4).parse_args()
    torch.set_num_threads(args.threads)
    device, why = setup_device(args.device)
    print(why)

    recipe = RECIPES["1p"]
    records = training_records(read_index(*find_coco(args.data, "train")))
    samples = TrainingSet(records, recipe, seed=0)
    batch = default_collate([samples[0, k, k % len(samples)] for k in range(args.batch_size)])
    rows = []
    for name, precision in precisions(device).items():
        peers = {
            "network alone": network_alone(recipe, batch, precision),
            "training step, augmentation off": ours(
                replace(recipe, augment=False), batch, precision
            ),
            "training step": ours(recipe, batch, precision),
            "torchvision ssd300_vgg16": torchvisions(recipe, batch, precision),
        }
        times = race(peers, args.rounds, warmup=2)
        alone = times["network alone"]
        for peer, timing in times.items():
            speed = args.batch_size / np.median(timing.wall)
            ratios = (
                ratio(getattr(timing, clock), getattr(alone, clock)) for clock in ("wall", "cpu")
            )
            rows.append((name, peer, f"{speed:.2f}", *(f"{value:.3f}" for value in ratios)))
    header = ("precision", "", "images/s", "time, network alone = 1", "the same in CPU time")
    title = f"Training step on {device.type}, batch {args.batch_size}"
    print_table(f"{title}, aim: at most 1.10 of the network alone", header, rows)


def network(recipe: Recipe, device: torch.device):
    """The network and its optimizer, ready to train."""
    torch.manual_seed(0)
    model = placed(build_model(recipe, 80), device)
    return model, sgd(model, recipe, device)


def sgd(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    return build_sgd(list(model.parameters()), device, lr=LR, **options)


def network_alone(recipe: Recipe, batch: Batch, precision: Precision):
    device = precision.device
    model, optimizer = network(recipe, device)
    images = normalise(batch.images.to(device), recipe)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            offsets, logits = model(images)
        # Scaled, so that the weights stay finite.
        loss = 1e-6 * (offsets.float().sum() + logits.float().sum())
        loss.backward()
        optimizer.step()
        synchronize(device)

    return run


def ours(recipe: Recipe, batch: Batch, precision: Precision):
    return our_step(train, recipe, *network(recipe, precision.device), batch, precision)


def torchvisions(recipe: Recipe, batch: Batch, precision: Precision):
    device = precision.device
    torch.manual_seed(0)
    model = placed(ssd300_vgg16(weights=None, weights_backbone=None, num_classes=81), device)
    optimizer = sgd(model, recipe, device)
    images = list(batch.images.permute(0, 3, 1, 2).float().div(255).to(device))
    targets = [
        {
            "boxes": (boxes[valid] * recipe.image_size).to(device),
            "labels": (labels[valid] + 1).to(device),
        }
        for boxes, labels, valid in zip(batch.boxes, batch.labels, batch.valid, strict=True)
    ]
    return torchvision_step(model, optimizer, images, targets, precision)


if __name__ == "__main__":
    main()
