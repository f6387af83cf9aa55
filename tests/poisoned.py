#!/usr/bin/env python3
"""A model's train.py in which one image becomes NaN on its way to the network.

No legal file does that by itself. The environment names the model and the image's id, so that the
command line is that of train.py.
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.npu import entry

MODEL = "POISONED_MODEL"
IMAGE = "POISONED_IMAGE"


def main() -> int | None:
    package = os.environ[MODEL].replace("/", ".")
    train = importlib.import_module(f"{package}.train")
    augment = train.augment

    def poison(batch, recipe):
        images, boxes = augment(batch, recipe)
        images[batch.image_ids == int(os.environ[IMAGE])] = float("nan")
        return images, boxes

    train.augment = poison
    return train.main()


if __name__ == "__main__":
    entry.run(main)
