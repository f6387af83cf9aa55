"""One of several gloo processes: the loss of its own image of the golden `base` outputs.

    RANK=0 WORLD_SIZE=2 python -m tests.fcos.rank_losses STORE CASE

Prints its losses and the norm of its distance gradient as JSON. `one_empty`: rank 1 has no boxes.
"""

import json
import os
import sys

import common  # noqa: F401 before torch

# isort: split

import numpy as np
import torch
import torch.distributed as dist

from fcos.config import RECIPES
from fcos.loss import DetectionLoss
from fcos.model import Outputs
from tests.fcos.conftest import GOLDEN
from tests.fcos.test_golden import loss_outputs


def main(store: str, case: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=int(os.environ["WORLD_SIZE"])
    )
    image = slice(rank, rank + 1)
    outputs = Outputs(*(tuple(x[image] for x in maps) for maps in loss_outputs(case)))
    for distances in outputs.distances:
        distances.requires_grad_()
    kept = np.load(GOLDEN / "targets.npz")
    boxes = torch.from_numpy(kept[f"256x320.gt_bboxes.{rank}"]).unsqueeze(0)
    labels = torch.from_numpy(kept[f"256x320.gt_labels.{rank}"]).long().unsqueeze(0)
    valid = torch.full_like(labels, case != "one_empty" or rank == 0, dtype=torch.bool)
    losses = DetectionLoss(RECIPES["gn"], 80)(outputs, boxes, labels, valid)
    losses["loss"].backward()
    grads = torch.cat([x.grad.flatten() for x in outputs.distances])
    found = {name: loss.item() for name, loss in losses.items()}
    print(json.dumps({**found, "grad_bbox_l2": grads.double().norm().item()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
