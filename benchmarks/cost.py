#!/usr/bin/env python3
"""Estimate the time and memory of each recipe on one H100 by counting; nothing is measured.

    python3 benchmarks/cost.py                 the table of docs/results.md

Counted are the operations of the forward pass, the bytes that autograd keeps for the backward pass
in bf16, the parameters, and the kernels of a step. docs/results.md says how an estimate is made.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import argparse
import importlib
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import (
    CONVOLUTION,
    CONVOLUTION_BACKWARD,
    count_kernels,
    zeros_of_convolution,
    zeros_of_convolution_backward,
)
from common.fps.network_size import count_flops, num_parameters

# Of an H100 SXM, by NVIDIA's data sheet, and the shares of them that are assumed to be reached.
HALF_RATE = 989e12  # floating-point operations a second in fp16 or bf16, dense
TF32_RATE = 495e12
BANDWIDTH = 3.35e12  # bytes a second
SHARE_OF_RATE = 0.4
SHARE_OF_BANDWIDTH = 0.7
SECONDS_PER_KERNEL = 8e-6  # of the host
PASSES = 3  # operations of a step, as a multiple of those of the forward pass
# An activation is written and read in the forward pass, read in the backward pass; its gradient is
# written and read.
TOUCHES_OF_ACTIVATION = 5
# SGD reads the weight, the gradient and the momentum, and writes the weight and the momentum.
TOUCHES_OF_PARAMETER = 5
BYTES_OF_PARAMETER = 4 + 4 + 4 + 2  # weight, gradient, momentum, copy in half precision
TRAIN_IMAGES = 117_266  # of COCO 2017 with boxes
CLASSES = 80


class Case(NamedTuple):
    """A recipe: where it is, the size of its input, and whether it trains in half precision."""

    package: str
    recipe: str
    height: int
    width: int
    is_half: bool
    kernels: str  # its name in benchmarks/kernels.py, empty where that does not count it
    images: float  # of a whole run


CASES = (
    Case("ssd_mmdet", "1p", 300, 300, True, "ssd_mmdet", 24 * 5 * TRAIN_IMAGES),
    Case("ssd_mmdet", "ssd512", 512, 512, True, "", 24 * 5 * TRAIN_IMAGES),
    Case("ssd_resnet34", "1p", 300, 300, True, "ssd_resnet34", 90 * TRAIN_IMAGES),
    Case(
        "ssd_resnet34.tfrecord", "port", 300, 300, False, "ssd_resnet34_tfrecord", 54_000 * 8 * 32
    ),
    Case("m2det", "512_vgg", 512, 512, True, "m2det", 160 * TRAIN_IMAGES),
    Case("fcos", "gn", 800, 1344, True, "fcos", 12 * TRAIN_IMAGES),
    Case("fcos", "r101_gn", 800, 1344, True, "", 12 * TRAIN_IMAGES),
)


class WithoutConvolutions(TorchDispatchMode):
    """Gives zeros for convolutions: no number of bytes depends on values."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.name() == CONVOLUTION:
            return zeros_of_convolution(*args)
        if operator.name() == CONVOLUTION_BACKWARD:
            return zeros_of_convolution_backward(*args)
        return operator(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args()
    print(
        "| recipe | images a step | GFLOPs an image | kept an image, MiB | kernels a step | "
        "images/s, estimated | memory, GiB, estimated | hours, estimated |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        kernels = 0
        if case.kernels:
            kernels = count_kernels(case.kernels).total()
        print(line_of(case, kernels), flush=True)


def line_of(case: Case, kernels: int) -> str:
    """Return the line of the table for a recipe whose step has so many kernels (0: not counted)."""
    recipe = importlib.import_module(f"{case.package}.config").RECIPES[case.recipe]
    model = importlib.import_module(f"{case.package}.model").build_model(recipe, CLASSES)
    flops = count_flops(model, case.height, case.width)
    kept = bytes_kept(model, case)
    parameters = num_parameters(model)
    rate = HALF_RATE if case.is_half else TF32_RATE
    step = PASSES * flops * recipe.batch_size / (SHARE_OF_RATE * rate)
    touched = TOUCHES_OF_ACTIVATION * kept * recipe.batch_size
    touched += TOUCHES_OF_PARAMETER * 4 * parameters
    step += touched / (SHARE_OF_BANDWIDTH * BANDWIDTH)
    step = max(step, kernels * SECONDS_PER_KERNEL)
    images_a_second = recipe.batch_size / step
    memory = kept * recipe.batch_size + BYTES_OF_PARAMETER * parameters
    hours = case.images / images_a_second / 3600
    name = f"`{case.package.replace('.', '/')}` {case.recipe}"
    return (
        f"| {name} | {recipe.batch_size} | {flops / 1e9:.0f} | {kept / 2**20:.0f} | "
        f"{kernels or '-'} | {two_digits(images_a_second)} | {memory / 2**30:.1f} | {hours:.1f} |"
    )


def two_digits(estimate: float) -> str:
    """Return an estimate without the digits that it does not have."""
    return f"{float(f'{estimate:.1e}'):,.0f}"


def bytes_kept(model: nn.Module, case: Case) -> int:
    """Return the bytes that the backward pass of one more image needs, inputs of layers mostly."""
    two, three = (bytes_of_batch(model, case, images) for images in (2, 3))
    return three - two


def bytes_of_batch(model: nn.Module, case: Case, num_images: int) -> int:
    """Return the bytes that autograd keeps after the forward pass of a batch."""
    sizes = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    images = torch.zeros(num_images, 3, case.height, case.width)
    half = torch.autocast("cpu", torch.bfloat16, enabled=case.is_half)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with WithoutConvolutions(), half, hooks:
        outputs = model(images)
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del outputs
    return sum(sizes.values())


if __name__ == "__main__":
    main()
