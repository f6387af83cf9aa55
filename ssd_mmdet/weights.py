"""Loading weights: our checkpoints, MMDetection's of both key layouts, and VGG16 of Caffe.

The names in the network are MMDetection's before 2.14 (see model.py); later releases moved the
extra layers to a neck and wrapped convolutions, with the same tensors.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
from ssd_mmdet.config import RECIPES, Recipe

# Names from 2.14 on, and the same in the network: pattern, replacement.
SINCE_2_14 = (
    (re.compile(r"^neck\.l2_norm\."), r"backbone.l2_norm."),
    (re.compile(r"^(bbox_head\.(?:cls|reg)_convs\.\d+)\.0\."), r"\1."),
)
# In the neck: layer, convolution of the layer; each layer has two convolutions.
EXTRA_SINCE_2_14 = re.compile(r"^neck\.extra_layers\.(\d+)\.(\d+)\.conv\.")
EXTRA_BEFORE_2_14 = re.compile(r"^backbone\.extra\.(\d+)\.")
CONVOLUTIONS_OF_EXTRA_LAYER = 2
ONLY_IN_SSD512 = "backbone.extra.9.weight"
# The tensors whose rows are classes.
CLASS_HEAD = re.compile(r"bbox_head\.cls_convs\.\d+\.(weight|bias)")
# Fields of the recipe that the weights of a checkpoint belong to.
NETWORK = (
    "name",
    "image_size",
    "width",
    "anchor_sizes",
    "anchor_maps",
    "anchor_strides",
    "anchor_ratios",
)
SHAPES_OF_FIRST_MAP = 4


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
    num_channels = num_classes + 1  # background comes last
    shapes = torch.arange(num_rows // num_channels)
    return torch.arange(num_classes).unsqueeze(1) + shapes * num_channels


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, in any known layout, under the network's names."""
    return {_network_key(key): value for key, value in tensors_of(state).items()}


def _network_key(key: str) -> str:
    if key.startswith("features."):  # a VGG16 by itself
        return f"backbone.{key}"
    for pattern, replacement in SINCE_2_14:
        key = pattern.sub(replacement, key)
    match = EXTRA_SINCE_2_14.match(key)
    if match is None:
        return key
    layer, convolution = match.groups()
    number = CONVOLUTIONS_OF_EXTRA_LAYER * int(layer) + int(convolution)
    return f"backbone.extra.{number}.{key[match.end() :]}"


def recipe_of_checkpoint(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the network of a checkpoint.

    Ours say which it is, published detectors show it by their names. A backbone by itself changes
    nothing.
    """
    saved = state.get("recipe")
    if saved is None:
        keys = network_keys(state)
        if not any(key.startswith("bbox_head.") for key in keys):
            return recipe
        preset = "ssd512" if ONLY_IN_SSD512 in keys else "1p"
        saved = asdict(RECIPES[preset])
    return replace(recipe, **{field: saved[field] for field in NETWORK})


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    head = network_keys(state).get("bbox_head.cls_convs.0.bias")
    if head is None:
        raise UserError(f"{name_of(state)}: no detection heads; give a trained detector")
    channels = len(head) // SHAPES_OF_FIRST_MAP
    return channels - 1  # without background


def named_classes(state: Mapping) -> tuple[str, ...] | None:
    """Return the class names that a checkpoint holds, None where it holds none.

    Ours have `classes`, MMDetection 2.x's `meta.CLASSES`, 3.x's `meta.dataset_meta.classes`.
    """
    meta = _mapping(state.get("meta"))
    names = state.get("classes")
    if not names:
        names = meta.get("CLASSES")
    if not names:
        names = _mapping(meta.get("dataset_meta")).get("classes")
    if isinstance(names, list | tuple):
        return tuple(names)
    return None


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


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


def published_state_dict(model: nn.Module, since_2_14: bool = False) -> dict[str, Tensor]:
    """Return the weights as MMDetection's checkpoints have them: fp32 on the CPU, under its names.

    By default those before 2.14, which the port has and later releases convert while loading;
    with `since_2_14` the later ones, 3.x included.
    """
    weights = weights_on_cpu(model)
    if not since_2_14:
        return weights
    return {_key_since_2_14(key): value for key, value in weights.items()}


def _key_since_2_14(key: str) -> str:
    key = key.replace("backbone.l2_norm.", "neck.l2_norm.")
    key = re.sub(r"(_convs\.\d+)\.", r"\1.0.", key)
    match = EXTRA_BEFORE_2_14.match(key)
    if match is None:
        return key
    layer, convolution = divmod(int(match[1]), CONVOLUTIONS_OF_EXTRA_LAYER)
    return f"neck.extra_layers.{layer}.{convolution}.conv.{key[match.end() :]}"
