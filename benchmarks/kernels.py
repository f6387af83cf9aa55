#!/usr/bin/env python3
"""Count the kernels of a training step: dispatched aten operators that are no views.

    python3 benchmarks/kernels.py              all four models, at fp16 O1 with a static loss scale

On an accelerator each of them is a launch, whatever the sizes. The count does not depend on the
batch, which is one image here.
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
from collections import Counter
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.loop import TrainingLoop
from common.npu.precision import Precision

# The recipes that the launch scripts train.
RECIPES = {"ssd_mmdet": "1p", "ssd_resnet34": "1p", "m2det": "512_vgg", "fcos": "gn"}
# What makes a network quick without changing its number of operators.
NARROW = {
    "ssd_mmdet": {"width": 1 / 16},
    "ssd_resnet34": {},
    "m2det": {"planes": 16},
    "fcos": {"channels": 64, "img_scale": ("64,107",)},
}
DEVICE = torch.device("cpu")
IMAGES = 1
LOSS_SCALE = 128.0


class KernelCounter(TorchDispatchMode):
    """Counts the operators that run inside of it, those of the backward pass too, without views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "aten" and not operator.is_view:
            self.counts[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all four")
    parser.add_argument("--data", default=str(ROOT / "tests/data/tiny_coco"))
    parser.add_argument("--most", type=int, default=0, help="name the most frequent operators")
    args = parser.parse_args()
    for model in args.models or RECIPES:
        counts = count_kernels(model, args.data)
        print(f"{model}: {counts.total()} kernels a step", flush=True)
        for name, count in counts.most_common(args.most):
            print(f"  {count:5} {name}")


def count_kernels(model: str, data: str) -> Counter:
    """Return how often a step runs each operator; the first step, a slower one, is left out."""
    train = importlib.import_module(f"{model}.train")
    preset = train.RECIPES[RECIPES[model]]
    recipe = replace(preset, batch_size=IMAGES, **NARROW[model])
    counter = KernelCounter()
    flags = [f"--data={data}", "--device=cpu", "--kind=perf"]
    log = contextlib.redirect_stdout(io.StringIO())
    with log, TrainingLoop(train, recipe, flags, half_precision()) as loop:
        batch = next(iter(loop.loader))
        loop.step(batch)
        loop.step(batch, counter)
    return counter.counts


def half_precision() -> Precision:
    """Return fp16 O1 with a static scale, as on an accelerator."""
    precision = Precision(DEVICE, "O1")
    precision.dtype = torch.float16
    precision.static_scale = LOSS_SCALE
    return precision


if __name__ == "__main__":
    main()
