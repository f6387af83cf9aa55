#!/usr/bin/env python3
"""The training step of ssd_mmdet against torchvision's ssd300_vgg16, on the same images.

Both have VGG16, six feature maps, 8732 anchors and hard negatives. Ours is the step of train.py,
colour and flip on the device included; torchvision's begins with float images of the right size,
once as it comes and once in our memory layout. The multiplications that ours saves in fp32 on a
CPU (ssd_mmdet/winograd.py) are not in its GFLOP.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

from functools import partial

import torch
from torch.utils.data import default_collate
from torchvision.models.detection import ssd300_vgg16

from benchmarks.steps import arguments, our_step, placed, precisions, print_steps, torchvision_step
from common.coco.index import find_coco, read_index
from common.npu.device import setup_device
from common.npu.precision import Precision, build_sgd
from ssd_mmdet import train
from ssd_mmdet.config import RECIPES, Recipe
from ssd_mmdet.data import Batch, TrainingSet, training_records
from ssd_mmdet.model import build_model

AIM = "aim: 1.1 times torchvision's speed in fp32, on a CPU twice that in bf16, 1.5 on a GPU"


def main() -> None:
    args = arguments(__doc__.split("\n")[0], batch_size=4).parse_args()
    torch.set_num_threads(args.threads)
    device, why = setup_device(args.device)
    print(why)

    recipe = RECIPES["1p"]
    records = training_records(read_index(*find_coco(args.data, "train")))
    samples = TrainingSet(records, recipe, seed=0)
    batch = default_collate([samples[0, k, k % len(samples)] for k in range(args.batch_size)])
    makers = {
        "ours": ours,
        "torchvision, channels last": partial(torchvisions, fast=True),
        "torchvision ssd300_vgg16": torchvisions,
    }
    peers = {
        (who, name): make(recipe, batch, precision)
        for who, make in makers.items()
        for name, precision in precisions(device).items()
    }
    print_steps(f"Training step, {AIM},", peers, args, device)


def optimizer_of(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    return build_sgd(list(model.parameters()), device, lr=1e-6, **options)


def ours(recipe: Recipe, batch: Batch, precision: Precision):
    torch.manual_seed(0)
    model = placed(build_model(recipe, 80), precision.device)
    optimizer = optimizer_of(model, recipe, precision.device)
    return our_step(train, recipe, model, optimizer, batch, precision)


def torchvisions(recipe: Recipe, batch: Batch, precision: Precision, fast: bool = False):
    device = precision.device
    torch.manual_seed(0)
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=81)
    model = placed(model, device, fast)
    images = list(batch.images.permute(0, 3, 1, 2).float().div(255).to(device))
    # torchvision refuses boxes without area.
    real = batch.valid & (batch.boxes[..., 2:] > batch.boxes[..., :2]).all(dim=-1)
    targets = [
        {"boxes": boxes[own].to(device), "labels": labels[own].to(device) + 1}
        for boxes, labels, own in zip(batch.boxes, batch.labels, real, strict=True)
    ]
    optimizer = optimizer_of(model, recipe, device)
    return torchvision_step(model, optimizer, images, targets, precision)


if __name__ == "__main__":
    main()
