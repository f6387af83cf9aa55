"""Loading weights: our checkpoints, the port's, and torchvision's ImageNet ResNets.

The names in the network are the published ones (see model.py), so there is little to map: a
`module.` prefix of distributed runs is taken off, and torchvision's names become positions in the
backbone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from common.npu import checkpoint
from common.npu.weights import (
    LoadReport,
    class_changes,
    load_matching,
    name_of,
    tensors_of,
    weights_on_cpu,
    with_classes_of,
)
from ssd_resnet34.config import Recipe

# torchvision's name: position in the backbone. Its layer4 and fc are not used here.
TORCHVISION = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5}
# The tensors whose rows are classes.
CLASS_HEAD = re.compile(r"mbox\.\d+\.(weight|bias)")
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
    class by class (`with_classes_of`). Tensors of another shape stay as initialised. Raise
    UserError for an unreadable file, for one of which nothing fits, and for a detector of the
    TFRecord recipe.
    """
    state = source if isinstance(source, Mapping) else checkpoint.load(source)
    tensors = network_keys(state)
    if any(key.startswith("class_net.") for key in tensors):
        raise UserError(
            f"{name_of(state)}: a detector of the TFRecord recipe, whose padding and heads differ; "
            "use ssd_resnet34/tfrecord"
        )
    heads = [key for key in tensors if CLASS_HEAD.fullmatch(key)]
    changes = ""
    trained = known_classes(state) if heads else None
    if trained is not None and classes is not None:
        tensors = with_classes_of(tensors, model, heads, class_rows, trained, classes)
        changes = class_changes(trained, classes)
    report = load_matching(model, tensors, changes)
    if not any(key.endswith("weight") for key in report.loaded):
        raise UserError(
            f"{name_of(state)}: no tensor fits this network; is it a checkpoint of another one?"
        )
    return report


def class_rows(num_rows: int, num_classes: int) -> Tensor:
    """Return the rows (classes, shapes) of each class in a head, which are ordered by class."""
    num_shapes = num_rows // (1 + num_classes + COORDINATES)
    channels = 1 + torch.arange(num_classes).unsqueeze(1)  # background comes first
    return channels * num_shapes + torch.arange(num_shapes)


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, in any known layout, under the network's names."""
    renamed = {}
    for key, value in tensors_of(state).items():
        first, _, rest = key.partition(".")
        if first in TORCHVISION:
            key = f"model.{TORCHVISION[first]}.{rest}"
        renamed[key] = value
    return renamed


def recipe_of_checkpoint(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the network that a checkpoint of ours was trained with.

    Other files do not say it: the recipe stays as it is.
    """
    saved = state.get("recipe", {})
    changes = {field: saved[field] for field in NETWORK if field in saved}
    return replace(recipe, **changes)


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    head = network_keys(state).get("mbox.0.weight")
    if head is None:
        raise UserError(f"{name_of(state)}: no detection heads; give a trained detector")
    # For each anchor shape a channel per class, for background, and for each coordinate.
    channels = len(head) // SHAPES_OF_FIRST_MAP
    return channels - COORDINATES - 1


def named_classes(state: Mapping) -> tuple[str, ...] | None:
    """Return the class names that a checkpoint holds: ours do, the port's do not."""
    if "classes" not in state:
        return None
    return tuple(state["classes"])


def known_classes(state: Mapping) -> tuple[str, ...] | None:
    """Return a detector's class names; where it holds none, COCO's if there are 80 classes."""
    names = named_classes(state)
    if names is None and num_classes_of(state) == len(COCO_CLASSES):
        return COCO_CLASSES
    return names


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """Return a detector's class names, numbers where they are not known."""
    names = known_classes(state)
    if names is not None:
        return names
    return tuple(f"class_{label}" for label in range(num_classes_of(state)))


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as the port's checkpoints have them: fp32 on the CPU, under its names."""
    return weights_on_cpu(model)
