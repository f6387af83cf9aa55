"""Loading weights: our checkpoints, the original's, VGG-16 "reducedfc", torchvision's ResNets.

The names in the network are the published ones (see model.py), so there is little to map: a
`module.` prefix of distributed runs is taken off, a backbone's names get `base.` in front.
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
from m2det.config import Recipe

# vgg16_reducedfc.pth numbers its convolutions, torchvision's ResNets name theirs.
BACKBONE_KEY = re.compile(r"(\d+|conv1|bn1|layer[1-4]|fc)\.")
# The tensors whose rows are classes.
CLASS_HEAD = re.compile(r"conf\.\d+\.(weight|bias)")
# Fields of the recipe that the weights of a checkpoint belong to.
NETWORK = (
    "name",
    "backbone",
    "image_size",
    "planes",
    "num_levels",
    "sfam",
    "smooth",
    "anchor_maps",
    "anchor_steps",
    "anchor_sizes",
    "anchor_ratios",
)
COORDINATES = 4


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Load a file or a state dict, in any of the known layouts, into the network.

    With `classes`, those of the network, the class heads of a detector of other classes are loaded
    class by class (`with_classes_of`). Tensors of another shape stay as initialised. Raise
    UserError for an unreadable file and for one of which nothing fits.
    """
    state = source if isinstance(source, Mapping) else checkpoint.load(source)
    tensors = network_keys(state)
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
    """Return the rows (classes, shapes) of each class in a class head.

    They are ordered by shape and, of a shape, by class.
    """
    num_channels = 1 + num_classes  # background comes first
    shapes = torch.arange(num_rows // num_channels)
    return 1 + torch.arange(num_classes).unsqueeze(1) + shapes * num_channels


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, in any known layout, under the network's names."""
    renamed = {}
    for key, value in tensors_of(state).items():
        if BACKBONE_KEY.match(key):
            key = f"base.{key}"
        renamed[key] = value
    return renamed


def recipe_of_checkpoint(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the network that a checkpoint of ours was trained with.

    Other files do not say it: the recipe stays as it is. Checkpoints written before the anchors had
    that name call their fields `prior_*`.
    """
    saved = state.get("recipe", {})
    changes = {}
    for field in NETWORK:
        for name in (field, field.replace("anchor_", "prior_")):
            if name in saved:
                changes[field] = saved[name]
    return replace(recipe, **changes)


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    tensors = network_keys(state)
    deltas_bias = tensors.get("loc.0.bias")
    logits_bias = tensors.get("conf.0.bias")
    if deltas_bias is None or logits_bias is None:
        raise UserError(f"{name_of(state)}: no detection heads; give a trained detector")
    num_shapes = len(deltas_bias) // COORDINATES
    return len(logits_bias) // num_shapes - 1  # without background


def named_classes(state: Mapping) -> tuple[str, ...] | None:
    """Return the class names that a checkpoint holds: ours do, the original's do not."""
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
    """Return the weights as the original's checkpoints have them: fp32 on the CPU, its names."""
    return weights_on_cpu(model)
