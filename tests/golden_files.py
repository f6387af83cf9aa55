"""Reading the golden files of a model."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def golden_reader(model: str) -> Callable[[str], dict | list]:
    """A function of names: "loss" gives the arrays of loss.npz, "lr" the contents of lr.json."""

    @functools.cache
    def read(name: str) -> dict | list:
        path = GOLDEN / model / name
        if path.suffix not in (".npz", ".json"):
            path = path.with_name(f"{path.name}.npz")
            if not path.exists():
                path = path.with_suffix(".json")
        if path.suffix == ".npz":
            return dict(np.load(path))
        return json.loads(path.read_text())

    return read
