#!/usr/bin/env python3
"""A model's train.py on a device whose memory is full from a number of images on.

The environment names the model, and for each rank the most images that fit: "4,2".
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.npu import batch_search, entry, memory

ROOMY = memory.Memory(total=1 << 50, used=0, room=1 << 49)
MODEL = "LIMITED_MODEL"
MOST_IMAGES = "LIMITED_IMAGES"
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def limit(program, most_images: int, error: Exception = FULL) -> None:
    """Let a training program run out of memory as an accelerator does, above so many images."""
    augment = program.augment

    def augment_if_it_fits(batch, recipe):
        if len(batch.images) > most_images:
            raise type(error)(*error.args)
        return augment(batch, recipe)

    program.augment = augment_if_it_fits
    batch_search.in_host_memory = lambda device: False
    memory.memory_of = lambda device, num_sharing: ROOMY


def main() -> int | None:
    package = os.environ[MODEL].replace("/", ".")
    program = importlib.import_module(f"{package}.train")
    of_ranks = os.environ[MOST_IMAGES].split(",")
    limit(program, int(of_ranks[int(os.environ["RANK"])]))
    return program.main()


if __name__ == "__main__":
    entry.run(main)
