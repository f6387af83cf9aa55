#!/usr/bin/env python3
"""The training step of ssd_resnet34 against its own network, and against torchvision's SSD300.

The network alone is forward, backward of the outputs' sum, and SGD. The step is the one of
train.py, with its loss terms fetched after each step, as for a log line; with and without colour
and flip. torchvision's nearest detector is ssd300_vgg16: another trunk, so its row says how a user
of either fares, not which loss is better.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

from dataclasses import replace

import numpy as np
import torch
import torchvision
from torch.utils.data import default_collate

from benchmarks.timing import print_table, race, ratio
from common.coco.index import find_coco, read_index
from common.fps.window import LossWindow
from common.npu.device import DEVICES, memory_format, setup_device
from common.npu.precision import Precision, build_sgd
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.data import Batch, TrainingSet, normalise, training_records
from ssd_resnet34.loss import DetectionLoss
from ssd_resnet34.model import build_model
from ssd_resnet34.train import LOSSES, Training

LR = 1e-4  # small: random weights must not diverge while they are timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, why = setup_device(args.device)
    print(why)

    recipe = RECIPES["1p"]
    records = training_records(read_index(*find_coco(args.data, "train")))
    samples = TrainingSet(records, recipe, seed=0)
    batch = default_collate([samples[0, k, k % len(samples)] for k in range(args.batch_size)])
    rows = []
    for name, level in (("fp32", "O0"), ("bf16", "O1")):
        precision = Precision(device, level, dtype="auto" if level == "O0" else "bf16")
        peers = {
            "network alone": network_alone(recipe, batch, precision),
            "training step, augmentation off": step(
                replace(recipe, augment=False), len(records.class_names), batch, precision
            ),
            "training step": step(recipe, len(records.class_names), batch, precision),
            "torchvision ssd300_vgg16": torchvision_step(recipe, batch, precision),
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


def synchronize(device: torch.device) -> None:
    """Wait for everything issued to the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def network(recipe: Recipe, classes: int, device: torch.device):
    """The network and its optimizer, ready to train."""
    torch.manual_seed(0)
    model = build_model(recipe, classes).to(device, memory_format=memory_format(device)).train()
    return model, sgd(model, recipe, device)


def sgd(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    return build_sgd(list(model.parameters()), device, lr=LR, **options)


def network_alone(recipe: Recipe, batch: Batch, precision: Precision):
    device = precision.device
    model, optimizer = network(recipe, 80, device)
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


def step(recipe: Recipe, classes: int, batch: Batch, precision: Precision):
    """One step as train.py makes it: its own method, on the few attributes that it uses."""
    device = precision.device
    model, optimizer = network(recipe, classes, device)
    training = Training.__new__(Training)
    vars(training).update(
        recipe=recipe,
        device=device,
        precision=precision,
        network=model,
        optimizer=optimizer,
        criterion=DetectionLoss(recipe, classes).to(device),
        window=LossWindow(LOSSES, device),
        iteration=0,
        lr=lambda iteration: LR,
    )

    def run() -> None:
        training.step(batch)
        losses = training.window.fetch().means()
        training.window = LossWindow(LOSSES, device)
        assert np.isfinite(losses["loss"]), losses
        synchronize(device)

    return run


def torchvision_step(recipe: Recipe, batch: Batch, precision: Precision):
    device = precision.device
    torch.manual_seed(0)
    model = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=81
    )
    model = model.to(device, memory_format=memory_format(device)).train()
    optimizer = sgd(model, recipe, device)
    images = list(batch.images.permute(0, 3, 1, 2).float().div(255).to(device))
    targets = [
        {
            "boxes": (boxes[valid] * recipe.image_size).to(device),
            "labels": (labels[valid] + 1).to(device),
        }
        for boxes, labels, valid in zip(batch.boxes, batch.labels, batch.valid, strict=True)
    ]

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        synchronize(device)

    return run


if __name__ == "__main__":
    main()
