#!/usr/bin/env python3
"""Count the kernels of a training step: dispatched aten operators that compute something.

    python3 benchmarks/kernels.py              all recipes, each as its launch scripts train it

On an accelerator each of them is a launch or a few, whatever the sizes; views and allocations are
none. An operator on lists of tensors is one on a CUDA device if the lists are short. The count does
not depend on the batch, which is one image here. Half precision is fp16 with a static loss scale.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: F401 before torch

# isort: split

import argparse
import contextlib
import importlib
import io
import tempfile
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.loop import TrainingLoop
from common.npu import checkpoint
from common.npu.precision import Precision

COCO = ROOT / "tests/data/tiny_coco"
SHARDS = ROOT / "tests/golden/ssd_resnet34_tfrecord/train2017*"


class Case(NamedTuple):
    """A recipe that the launch scripts train, and the flags that give it data."""

    package: str
    recipe: str
    flags: tuple[str, ...]


CASES = {
    "ssd_mmdet": Case("ssd_mmdet", "1p", (f"--data={COCO}", "--kind=perf")),
    "ssd_resnet34": Case("ssd_resnet34", "1p", (f"--data={COCO}", "--kind=perf")),
    "ssd_resnet34_tfrecord": Case(
        "ssd_resnet34.tfrecord", "port", (f"--training_file_pattern={SHARDS}", "--mode=train")
    ),
    "m2det": Case("m2det", "512_vgg", (f"--data={COCO}", "--kind=perf")),
    "fcos": Case("fcos", "gn", (f"--data={COCO}", "--kind=perf")),
}
DEVICE = torch.device("cpu")
IMAGES = 1
LOSS_SCALE = 128.0
# They give memory, or the same memory in another shape.
NO_KERNELS = frozenset(
    [
        "aten::empty.memory_format",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::_unsafe_view",
    ]
)
CONVOLUTION = "aten::convolution"
CONVOLUTION_BACKWARD = "aten::convolution_backward"


class KernelCounter(TorchDispatchMode):
    """Counts the operators that run inside of it, those of the backward pass too.

    A convolution is counted, but gives zeros: it would take nearly all of the time, and no number
    of operators depends on values.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        if operator.namespace == "aten" and not operator.is_view and name not in NO_KERNELS:
            self.counts[name] += 1
        if name == CONVOLUTION:
            return zeros_of_convolution(*args)
        if name == CONVOLUTION_BACKWARD:
            return zeros_of_convolution_backward(*args)
        return operator(*args, **(kwargs or {}))


def zeros_of_convolution(images, weight, bias, *options):
    """Return zeros in the shape of a convolution's result and in the layout of its input."""
    shape = torch.ops.aten.convolution(images.to("meta"), weight.to("meta"), None, *options).shape
    layout = torch.channels_last
    if images.is_contiguous():
        layout = torch.contiguous_format
    return torch.empty(shape, dtype=images.dtype, memory_format=layout).zero_()


def zeros_of_convolution_backward(gradient, images, weight, bias_sizes, *options):
    """Return zeros as the gradients of a convolution, each in the layout of what it belongs to."""
    *_, (of_images, of_weight, of_bias) = options
    return (
        torch.zeros_like(images) if of_images else None,
        torch.zeros_like(weight) if of_weight else None,
        images.new_zeros(bias_sizes) if of_bias else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--most", type=int, default=0, help="name the most frequent operators")
    args = parser.parse_args()
    for name in args.recipes or CASES:
        counts = count_kernels(name)
        print(f"{name}: {counts.total()} kernels a step", flush=True)
        for operator, count in counts.most_common(args.most):
            print(f"  {count:5} {operator}")


def count_kernels(name: str) -> Counter:
    """Return how often a step of a case runs each operator; the first step, which also makes what
    is made once, is left out.
    """
    case = CASES[name]
    train = importlib.import_module(f"{case.package}.train")
    recipe = replace(train.RECIPES[case.recipe], batch_size=IMAGES)
    precision = Precision(DEVICE)
    if recipe.amp != "O0":
        precision = half_precision()
    flags = [*case.flags, "--device=cpu"]
    counter = KernelCounter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if name == "fcos":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            flags.append(f"--pretrained={random_backbone(recipe, Path(folder))}")
        loop = stack.enter_context(TrainingLoop(train, recipe, flags, precision))
        batch = next(iter(loop.loader))
        loop.step(batch, KernelCounter())
        loop.step(batch, counter)
    return counter.counts


def half_precision() -> Precision:
    """Return fp16 O1 with a static scale, as on an accelerator."""
    precision = Precision(DEVICE, "O1")
    precision.dtype = torch.float16
    precision.static_scale = LOSS_SCALE
    return precision


def random_backbone(recipe, folder: Path) -> Path:
    """Return a file of random weights for fcos: parts of a pretrained backbone are frozen."""
    backbone = importlib.import_module("fcos.backbone").make_backbone(recipe.backbone)
    path = folder / "backbone.pth"
    checkpoint.save(path, backbone.state_dict())
    return path


if __name__ == "__main__":
    main()
