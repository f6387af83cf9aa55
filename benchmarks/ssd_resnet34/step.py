#!/usr/bin/env python3
"""The training step of ssd_resnet34 against its network alone, and against torchvision's SSD300.

The network alone is forward, backward of the outputs' sum, and SGD. The step is that of train.py,
colour jitter and flip on the device included. torchvision's nearest detector is ssd300_vgg16, with
another backbone: its row says how a user of either fares, not which loss is better.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate
from torchvision.models.detection import ssd300_vgg16

from benchmarks.steps import LR, arguments, placed, precisions, synchronize, torchvision_step
from benchmarks.timing import print_table, race, ratio
from common.coco.index import read_index
from common.coco.layout import find_coco
from common.npu.device import setup_device
from common.npu.precision import Precision, build_sgd
from ssd_resnet34.augment import augment
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.data import Batch, TrainingSet, normalise, training_records
from ssd_resnet34.loss import DetectionLoss
from ssd_resnet34.model import build_model

CLASSES = 80
NETWORK_ALONE = "network alone"


def main() -> None:
    args = arguments(__doc__.split("\n")[0], batch_size=4).parse_args()
    torch.set_num_threads(args.threads)
    device, reason = setup_device(args.device)
    print(reason)

    recipe = RECIPES["1p"]
    without_augmentation = replace(recipe, augment=False)
    batch = first_batch(args.data, recipe, args.batch_size)
    rows = []
    for precision_name, precision in precisions(device).items():
        peers = {
            NETWORK_ALONE: network_alone(recipe, batch, precision),
            "training step, augmentation off": our_step(without_augmentation, batch, precision),
            "training step": our_step(recipe, batch, precision),
            "torchvision ssd300_vgg16": torchvision_peer(recipe, batch, precision),
        }
        times = race(peers, args.rounds, warmup=2)
        alone = times[NETWORK_ALONE]
        for name, timing in times.items():
            images_a_second = args.batch_size / np.median(timing.wall)
            rows.append(
                (
                    precision_name,
                    name,
                    f"{images_a_second:.2f}",
                    f"{ratio(timing.wall, alone.wall):.3f}",
                    f"{ratio(timing.cpu, alone.cpu):.3f}",
                )
            )
    header = ("precision", "", "images/s", "time, network alone = 1", "the same in CPU time")
    print_table(f"Training step on {device.type}, batch {args.batch_size}", header, rows)


def first_batch(data_path: str, recipe: Recipe, batch_size: int) -> Batch:
    """Return a batch of the first images of the training set."""
    annotation_file, image_dir, _ = find_coco(data_path, "train")
    records = training_records(read_index(annotation_file, image_dir))
    dataset = TrainingSet(records, recipe, seed=0)
    samples = []
    for position in range(batch_size):
        samples.append(dataset[0, position, position % len(dataset)])
    return default_collate(samples)


def make_network(recipe: Recipe, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return placed(build_model(recipe, CLASSES), device)


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    return build_sgd(
        list(model.parameters()),
        device,
        lr=LR,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def network_alone(recipe: Recipe, batch: Batch, precision: Precision) -> Callable[[], None]:
    """Return a step without augmentation and loss."""
    device = precision.device
    model = make_network(recipe, device)
    optimizer = make_optimizer(model, recipe, device)
    images = normalise(batch.images.to(device), recipe)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            deltas, logits = model(images)
        # Scaled, so that the weights stay finite.
        loss = 1e-6 * (deltas.float().sum() + logits.float().sum())
        loss.backward()
        optimizer.step()
        synchronize(device)

    return run


def our_step(recipe: Recipe, batch: Batch, precision: Precision) -> Callable[[], None]:
    """Return a training step as train.py makes it, which reads the loss at its end."""
    device = precision.device
    model = make_network(recipe, device)
    optimizer = make_optimizer(model, recipe, device)
    criterion = DetectionLoss(recipe, CLASSES).to(device)

    def run() -> None:
        moved = batch.to(device)
        images, boxes = augment(moved, recipe)
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            outputs = model(images)
        losses = criterion(outputs, boxes, moved.labels, moved.valid)
        precision.backward(losses["loss"], optimizer)
        precision.step(optimizer, recipe.clip_norm)
        assert np.isfinite(losses["loss"].item()), losses

    return run


def torchvision_peer(recipe: Recipe, batch: Batch, precision: Precision) -> Callable[[], None]:
    """Return a training step of torchvision's model on the images of a batch."""
    device = precision.device
    torch.manual_seed(0)
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    model = placed(model, device)
    images = list(batch.images.permute(0, 3, 1, 2).float().div(255).to(device))
    targets = []
    for boxes, labels, valid in zip(batch.boxes, batch.labels, batch.valid, strict=True):
        targets.append(
            {
                "boxes": (boxes[valid] * recipe.image_size).to(device),
                # torchvision's label 0 is the background.
                "labels": (labels[valid] + 1).to(device),
            }
        )
    optimizer = make_optimizer(model, recipe, device)
    return torchvision_step(model, optimizer, images, targets, precision)


if __name__ == "__main__":
    main()
