#!/usr/bin/env python3
"""The training step of fcos against torchvision's fcos_resnet50_fpn, on the same images.

Both have ResNet-50 with frozen stem, C2 and batch norm, five FPN levels and a head with group norm.
Ours is the step of train.py, normalisation and padding on the device included; torchvision's begins
with float images of the same size, once as it comes and once in our memory layout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

from dataclasses import replace
from functools import partial

import torch
from torchvision.models import resnet50
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.steps import arguments, our_step, placed, precisions, print_steps, torchvision_step
from common.coco.index import find_coco, read_index
from common.npu.device import setup_device
from common.npu.precision import Precision, build_sgd
from fcos import train
from fcos.config import RECIPES, Recipe
from fcos.data import Batch, TrainingSet, orientation, training_records
from fcos.model import build_model, param_groups

AIM = "aim: 1.2 times torchvision's speed in fp32, on a CPU twice that in bf16, 1.5 on a GPU"


def main() -> None:
    parser = arguments(__doc__.split("\n")[0], batch_size=1)
    parser.add_argument("--img_scale", default="800,1333", help="sides that images fit in, pixels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, why = setup_device(args.device)
    print(why)

    recipe = replace(RECIPES["gn"], img_scale=(args.img_scale,))
    records = training_records(read_index(*find_coco(args.data, "train")))
    samples, lying = TrainingSet(records, recipe, seed=0), orientation(records).nonzero()[0]
    batch = samples.collate(
        [samples[0, k, int(lying[k % len(lying)])] for k in range(args.batch_size)]
    )
    makers = {
        "ours": ours,
        "torchvision, channels last": partial(torchvisions, fast=True),
        "torchvision fcos_resnet50_fpn": torchvisions,
    }
    peers = {
        (who, name): make(recipe, batch, precision)
        for who, make in makers.items()
        for name, precision in precisions(device).items()
    }
    print_steps(f"Training step, {AIM}, images of {args.img_scale}", peers, args, device)


def ours(recipe: Recipe, batch: Batch, precision: Precision):
    torch.manual_seed(0)
    model = placed(build_model(recipe, 80), precision.device)
    model.backbone.freeze()
    optimizer = build_sgd(param_groups(model, recipe), precision.device, **sgd(recipe))
    return our_step(train, recipe, model, optimizer, batch, precision)


def sgd(recipe: Recipe) -> dict[str, float]:
    return {"lr": 1e-6, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}


def torchvisions(recipe: Recipe, batch: Batch, precision: Precision, fast: bool = False):
    device = precision.device
    torch.manual_seed(0)
    # As fcos_resnet50_fpn builds it for pretrained weights: they need not be fetched to be timed.
    backbone = _resnet_fpn_extractor(
        resnet50(norm_layer=FrozenBatchNorm2d),
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    short, long = recipe.eval_scale
    model = FCOS(backbone, num_classes=80, min_size=short, max_size=long)
    for name, scale in model.named_buffers():
        if name.endswith("bn3.weight"):
            scale.zero_()  # as ours: random weights without a norm must not explode
    model = placed(model, device, fast)
    images, targets = [], []
    for k, (height, width) in enumerate(batch.sizes.tolist()):
        images.append(batch.images[k, :height, :width].permute(2, 0, 1).float().div(255).to(device))
        own = batch.valid[k]
        targets.append(
            {"boxes": batch.boxes[k, own].to(device), "labels": batch.labels[k, own].to(device)}
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_sgd(trained, device, **sgd(recipe))
    return torchvision_step(model, optimizer, images, targets, precision)


if __name__ == "__main__":
    main()
