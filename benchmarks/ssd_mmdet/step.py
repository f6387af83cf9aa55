#!/usr/bin/env python3
"""The training step of ssd_mmdet against torchvision's ssd300_vgg16, on the same images.

Both have VGG16, six feature maps, 8732 anchors and hard negatives. Ours is the step of train.py,
colour jitter and flip on the device included. That of torchvision begins with float images of the
right size; it is measured as it comes and in our memory layout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate
from torchvision.models.detection import ssd300_vgg16

from benchmarks.steps import LR, arguments, placed, precisions, print_steps, torchvision_step
from common.coco.index import read_index
from common.coco.layout import find_coco
from common.npu.device import setup_device
from common.npu.precision import Precision, build_sgd
from ssd_mmdet.augment import augment
from ssd_mmdet.config import RECIPES, Recipe
from ssd_mmdet.data import Batch, TrainingSet, training_records
from ssd_mmdet.loss import DetectionLoss
from ssd_mmdet.model import build_model

CLASSES = 80
TORCHVISION = "torchvision ssd300_vgg16"


def main() -> None:
    args = arguments(__doc__.split("\n")[0], batch_size=4).parse_args()
    torch.set_num_threads(args.threads)
    device, reason = setup_device(args.device)
    print(reason)

    recipe = RECIPES["1p"]
    batch = first_batch(args.data, recipe, args.batch_size)
    peers = {}
    for name, precision in precisions(device).items():
        peers["ours", name] = our_step(recipe, batch, precision)
    for name, precision in precisions(device).items():
        model = placed(torchvision_model(), device)
        step = torchvision_peer(model, recipe, batch, precision)
        peers["torchvision, channels last", name] = step
    for name, precision in precisions(device).items():
        model = placed(torchvision_model(), device, fast=False)
        step = torchvision_peer(model, recipe, batch, precision)
        peers[TORCHVISION, name] = step
    print_steps("Training step", peers, args, device, TORCHVISION)


def first_batch(data_path: str, recipe: Recipe, batch_size: int) -> Batch:
    """Return a batch of the first images of the training set."""
    annotation_file, image_dir, _ = find_coco(data_path, "train")
    records = training_records(read_index(annotation_file, image_dir))
    dataset = TrainingSet(records, recipe, seed=0)
    samples = []
    for position in range(batch_size):
        record = position % len(dataset)
        samples.append(dataset[0, position, record])
    return default_collate(samples)


def our_step(recipe: Recipe, batch: Batch, precision: Precision) -> Callable[[], None]:
    """Return a training step as train.py makes it, which reads the loss at its end."""
    device = precision.device
    torch.manual_seed(0)
    model = placed(build_model(recipe, CLASSES), device)
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


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    return build_sgd(
        list(model.parameters()),
        device,
        lr=LR,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def torchvision_model() -> nn.Module:
    """Return torchvision's SSD300 with random weights."""
    torch.manual_seed(0)
    return ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1)


def torchvision_peer(
    model: nn.Module, recipe: Recipe, batch: Batch, precision: Precision
) -> Callable[[], None]:
    """Return a training step of torchvision's model on the images of a batch."""
    device = precision.device
    images = list(batch.images.permute(0, 3, 1, 2).float().div(255).to(device))
    # torchvision refuses boxes without area.
    has_area = (batch.boxes[..., 2:] > batch.boxes[..., :2]).all(dim=-1)
    used = batch.valid & has_area
    targets = []
    for i in range(len(images)):
        targets.append(
            {
                "boxes": batch.boxes[i, used[i]].to(device),
                # torchvision's label 0 is the background.
                "labels": batch.labels[i, used[i]].to(device) + 1,
            }
        )
    optimizer = make_optimizer(model, recipe, device)
    return torchvision_step(model, optimizer, images, targets, precision)


if __name__ == "__main__":
    main()
