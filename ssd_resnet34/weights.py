"""Weights: our checkpoints, the port's, and torchvision's ImageNet ResNets.

    python3 -m ssd_resnet34.weights export best.pt iter_366000.pt

writes a checkpoint in the port's form. The names in the network are the published ones (see
model.py), so there is little to map: torchvision's names become positions in the backbone.
"""

if __name__ == "__main__":
    import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.npu import checkpoint, entry
from common.npu.identify import require_model
from common.npu.published import export_published
from common.npu.weights import (
    Layout,
    LoadReport,
    class_changes,
    class_names_or_numbers,
    known_classes,
    load_whole,
    name_of,
    recipe_fields,
    renamed,
    require_numbers,
    rows_of,
    tensors_of,
    weights_on_cpu,
    with_classes_of,
)
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.model import build_model

# torchvision's name: position in the backbone. Its layer4 and fc are not used here.
TORCHVISION = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5}
LAYOUT = Layout(
    class_head=re.compile(r"mbox\.\d+\.(weight|bias)"),
    backbone="model.",
    unused=re.compile(r"(layer4|fc)\..*"),
    remedy="give a detector of ssd_resnet34 with its --backbone, or torchvision's file of that",
)
LAYOUTS = ("port",)  # the port's, whose files have only `model`, the state dict
# Fields of the recipe that the weights of a checkpoint belong to.
NETWORK = ("name", "backbone")
COORDINATES = 4
SHAPES_OF_FIRST_MAP = 4


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Load a file or a state dict, in any of the known layouts, into the network.

    With `classes`, those of the network, the class heads of a detector of other classes are loaded
    class by class (`with_classes_of`). Class heads of another shape stay as initialised; anything
    else must fit. Raise UserError for an unreadable file and for one that does not fit.
    """
    state = source if isinstance(source, Mapping) else checkpoint.load(source)
    tensors = network_keys(state)
    require_model(state, tensors, Recipe.model, name_of(state))
    require_numbers(model, tensors, name_of(state))
    heads = [key for key in tensors if LAYOUT.class_head.fullmatch(key)]
    changes = ""
    trained = known_classes(state, num_classes_of(state)) if heads else None
    if heads and classes is not None:
        if trained is not None:
            tensors = with_classes_of(tensors, model, heads, class_rows, trained, classes)
        changes = class_changes(state, trained, classes)
    return load_whole(model, tensors, state, LAYOUT, changes)


def class_rows(num_rows: int, num_classes: int) -> Tensor:
    """Return the rows (classes, shapes) of each class in a head, which are ordered by class."""
    num_shapes = num_rows // (1 + num_classes + COORDINATES)
    channels = 1 + torch.arange(num_classes).unsqueeze(1)  # background comes first
    return channels * num_shapes + torch.arange(num_shapes)


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, in any known layout, under the network's names."""
    return renamed(state, tensors_of(state), _network_key)


def _network_key(key: str) -> str:
    first, _, rest = key.partition(".")
    if first in TORCHVISION:
        return f"model.{TORCHVISION[first]}.{rest}"
    return key


def recipe_of_checkpoint(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the network that a checkpoint of ours was trained with.

    Other files do not say it: the recipe stays as it is. Raise UserError for a detector of another
    model.
    """
    require_model(state, network_keys(state), Recipe.model, name_of(state))
    return replace(recipe, **recipe_fields(state, recipe, NETWORK))


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    # For each anchor shape a channel per class, for background, and for each coordinate.
    rows_of_one_class = (1 + 1 + COORDINATES) * SHAPES_OF_FIRST_MAP
    rows = rows_of(state, network_keys(state), "mbox.0.weight", rows_of_one_class)
    channels = rows // SHAPES_OF_FIRST_MAP
    return channels - COORDINATES - 1


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """Return a detector's class names, numbers where they are not known."""
    return class_names_or_numbers(state, num_classes_of(state))


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as the port's checkpoints have them: fp32 on the CPU, under its names."""
    return weights_on_cpu(model)


def published_file(state: Mapping, layout: str, recipe: Recipe) -> dict:
    """Return a checkpoint's detector as a file of the port.

    `recipe` is that of the checkpoint. Raise UserError where it is not a whole detector.
    """
    model = build_model(recipe, num_classes_of(state))
    load_weights(model, state).require_complete(name_of(state))
    return {"model": published_state_dict(model)}


def main(argv: list[str] | None = None) -> None:
    export_published(
        argv, "ssd_resnet34.weights", LAYOUTS, RECIPES, recipe_of_checkpoint, published_file
    )


if __name__ == "__main__":
    entry.run(main)
