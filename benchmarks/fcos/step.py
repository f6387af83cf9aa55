#!/usr/bin/env python3
"""The training step of fcos against torchvision's fcos_resnet50_fpn, on the same images.

Both have a ResNet-50 with frozen stem, C2 and batch norm, five FPN levels and a head with group
norm. Ours is the step of train.py, normalisation and padding on the device included. That of
torchvision begins with float images of the same size; it is measured as it comes and in our memory
layout.
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
from torchvision.models import resnet50
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.steps import LR, arguments, placed, precisions, print_steps, torchvision_step
from common.coco.index import read_index
from common.coco.layout import find_coco
from common.npu.device import setup_device
from common.npu.precision import Precision, build_sgd
from fcos.augment import augment
from fcos.config import RECIPES, Recipe
from fcos.data import Batch, TrainingSet, orientation_groups, training_records
from fcos.loss import DetectionLoss
from fcos.model import build_model, param_groups

CLASSES = 80
TORCHVISION = "torchvision fcos_resnet50_fpn"


def main() -> None:
    parser = arguments(__doc__.split("\n")[0], batch_size=1)
    parser.add_argument("--img_scale", default="800,1333", help="sides that images fit in, pixels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, reason = setup_device(args.device)
    print(reason)

    recipe = replace(RECIPES["gn"], img_scale=(args.img_scale,))
    batch = landscape_batch(args.data, recipe, args.batch_size)
    peers = {}
    for name, precision in precisions(device).items():
        peers["ours", name] = our_step(recipe, batch, precision)
    for name, precision in precisions(device).items():
        model = placed(torchvision_model(recipe), device)
        step = torchvision_peer(model, recipe, batch, precision)
        peers["torchvision, channels last", name] = step
    for name, precision in precisions(device).items():
        model = placed(torchvision_model(recipe), device, fast=False)
        step = torchvision_peer(model, recipe, batch, precision)
        peers[TORCHVISION, name] = step
    print_steps(f"Training step, images of {args.img_scale}", peers, args, device, TORCHVISION)


def landscape_batch(data_path: str, recipe: Recipe, batch_size: int) -> Batch:
    """Return a batch of the first images of the training set that are wider than high."""
    annotation_file, image_dir, _ = find_coco(data_path, "train")
    records = training_records(read_index(annotation_file, image_dir))
    landscape = orientation_groups(records)[1].tolist()
    dataset = TrainingSet(records, recipe, seed=0)
    samples = []
    for position in range(batch_size):
        record = landscape[position % len(landscape)]
        samples.append(dataset[0, position, record])
    return dataset.collate(samples)


def our_step(recipe: Recipe, batch: Batch, precision: Precision) -> Callable[[], None]:
    """Return a training step as train.py makes it, which reads the loss at its end."""
    device = precision.device
    torch.manual_seed(0)
    model = placed(build_model(recipe, CLASSES), device)
    model.backbone.freeze()
    optimizer = make_optimizer(param_groups(model, recipe), recipe, device)
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


def make_optimizer(parameters: list, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    return build_sgd(
        parameters, device, lr=LR, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def torchvision_model(recipe: Recipe) -> nn.Module:
    """Return torchvision's FCOS with random weights."""
    torch.manual_seed(0)
    # As fcos_resnet50_fpn builds it for pretrained weights, which need not be fetched to be timed.
    backbone = _resnet_fpn_extractor(
        resnet50(norm_layer=FrozenBatchNorm2d),
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    short, long = recipe.eval_scale
    model = FCOS(backbone, num_classes=CLASSES, min_size=short, max_size=long)
    for name, scale in model.named_buffers():
        if name.endswith("bn3.weight"):
            scale.zero_()  # as in ours, because random weights without a norm would explode
    return model


def torchvision_peer(
    model: nn.Module, recipe: Recipe, batch: Batch, precision: Precision
) -> Callable[[], None]:
    """Return a training step of torchvision's model on the images of a batch."""
    device = precision.device
    images = []
    targets = []
    for i, (height, width) in enumerate(batch.resized_sizes.tolist()):
        image = batch.images[i, :height, :width].permute(2, 0, 1)
        images.append(image.float().div(255).to(device))
        valid = batch.valid[i]
        targets.append(
            {
                "boxes": batch.boxes[i, valid].to(device),
                "labels": batch.labels[i, valid].to(device),
            }
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, recipe, device)
    return torchvision_step(model, optimizer, images, targets, precision)


if __name__ == "__main__":
    main()
