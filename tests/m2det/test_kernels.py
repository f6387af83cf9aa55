"""The number of kernels of a training step, each of which an accelerator launches."""

from dataclasses import replace

import torch

from benchmarks.kernels import KernelCounter, half_precision
from benchmarks.loop import TrainingLoop
from m2det import train
from m2det.config import RECIPES
from tests.scripts import TINY

MOST = 1815


def test_a_step_has_few_kernels():
    recipe = replace(RECIPES["512_vgg"], backbone="vgg16_thin", planes=16, batch_size=1)
    flags = [f"--data={TINY}", "--device=cpu", "--kind=perf"]
    precision = half_precision()
    precision.dtype = torch.bfloat16  # the same kernels, and a CPU is quicker at them
    counter = KernelCounter()
    with TrainingLoop(train, recipe, flags, precision) as loop:
        batch = next(iter(loop.loader))
        loop.step(batch)
        loop.step(batch, counter)
    assert counter.counts["aten::convolution"] == 158
    assert counter.counts.total() <= MOST
