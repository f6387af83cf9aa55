"""The number of kernels of a training step, each of which an accelerator launches."""

from dataclasses import replace

import torch

from benchmarks.kernels import KernelCounter, half_precision
from benchmarks.loop import TrainingLoop
from common.npu import checkpoint
from fcos import train
from fcos.config import RECIPES
from fcos.model import build_model
from tests.scripts import TINY

# With pretrained weights, so that batch norms are fixed.
MOST = 1227


def test_a_step_has_few_kernels(tmp_path):
    recipe = replace(RECIPES["gn"], channels=64, img_scale=("64,107",), batch_size=1)
    backbone_file = tmp_path / "resnet50.pth"
    checkpoint.save(backbone_file, build_model(recipe, 3).backbone.state_dict())
    flags = [f"--data={TINY}", "--device=cpu", "--kind=perf", f"--pretrained={backbone_file}"]
    precision = half_precision()
    precision.dtype = torch.bfloat16  # the same kernels, and a CPU is quicker at them
    counter = KernelCounter()
    with TrainingLoop(train, recipe, flags, precision) as loop:
        batch = next(iter(loop.loader))
        loop.step(batch)
        loop.step(batch, counter)
    assert counter.counts["aten::convolution"] == 116
    assert counter.counts.total() <= MOST
