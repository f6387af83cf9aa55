"""Run a program on the CPU in the NPU path's way: `python as_npu.py fused|lists PROGRAM [FLAGS]`.

The CPU path takes one image at a time and channels-last tensors, as is quickest there. Convolutions
then add up in another order. This takes whole batches and contiguous tensors, and updates weights
with SGD fused or over lists of tensors, so that results can be compared bit for bit.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: F401 before torch

# isort: split

import torch

from common.npu import device, precision

device.chunk_size = len
device.memory_format = lambda _: torch.contiguous_format
if sys.argv[1] == "lists":
    precision.obstacle_to_fused_sgd = lambda _: "the NPU has no kernel for it"
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
