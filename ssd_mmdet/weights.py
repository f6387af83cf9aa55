"""Weights: our checkpoints, MMDetection's of both key layouts, and VGG16 of Caffe.

    python3 -m ssd_mmdet.weights export best.pt ssd300.pth [--layout mmdet3]

writes a checkpoint in MMDetection's form. The names in the network are MMDetection's before 2.14
(see model.py); later releases moved the extra layers to a neck and wrapped convolutions, with the
same tensors.
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

from common.errors import UserError
from common.npu import checkpoint, entry
from common.npu.identify import require_model
from common.npu.published import export_published, mmdetection_file
from common.npu.weights import (
    Layout,
    LoadReport,
    class_changes,
    class_names_or_numbers,
    known_classes,
    load_whole,
    mapping,
    name_of,
    recipe_entry,
    recipe_fields,
    renamed,
    require_numbers,
    rows_of,
    tensors_of,
    weights_on_cpu,
    with_classes_of,
)
from ssd_mmdet.config import RECIPES, Recipe
from ssd_mmdet.model import build_model

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
FIRST_CONVOLUTION = "backbone.features.0.weight"
CHANNELS_OF_FIRST_CONVOLUTION = 64  # of a network of width 1
LAYOUT = Layout(
    class_head=re.compile(r"bbox_head\.cls_convs\.\d+\.(weight|bias)"),
    backbone="backbone.features.",
    unused=re.compile(r"classifier\..*"),
    remedy="give a detector of ssd_mmdet or MMDetection, or MMDetection's vgg16_caffe-292e1171.pth",
)
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
MMDETECTION_1 = re.compile(r"[01]\..*")
# MMDetection's keys before 2.14, and from then on.
LAYOUTS = ("mmdet2", "mmdet3")


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
    tensors, changes = with_background_last(tensors, state)
    heads = [key for key in tensors if LAYOUT.class_head.fullmatch(key)]
    trained = known_classes(state, num_classes_of(state)) if heads else None
    if heads and classes is not None:
        if trained is not None:
            tensors = with_classes_of(tensors, model, heads, class_rows, trained, classes)
        of_classes = class_changes(state, trained, classes)
        changes = "; ".join(text for text in (changes, of_classes) if text)
    return load_whole(model, tensors, state, LAYOUT, changes)


def with_background_last(
    tensors: dict[str, Tensor], state: Mapping
) -> tuple[dict[str, Tensor], str]:
    """Return tensors with the background after the classes, and a line on what was done.

    MMDetection 1.x has it before them. The version that a file names does not decide: the published
    SSD files of March 2020 name 1.0rc1, but were trained with the code of 2.0. The background is
    the class of most anchors, so it has the largest bias. Raise UserError where it has not.
    """
    version = mapping(state.get("meta")).get("mmdet_version")
    heads = [key for key in tensors if LAYOUT.class_head.fullmatch(key)]
    if not heads or not isinstance(version, str) or not MMDETECTION_1.fullmatch(version):
        return tensors, ""
    num_channels = num_classes_of(state) + 1
    biases = [tensors[key].float() for key in heads if key.endswith("bias")]
    bias_of_channel = torch.cat(biases).view(-1, num_channels).mean(dim=0)
    background = int(bias_of_channel.argmax())
    if background == num_channels - 1:
        return tensors, f"of MMDetection {version}, with the background last as in 2.x"
    if background != 0:
        raise UserError(
            f"{name_of(state)}: of MMDetection {version}, and its biases do not show whether the "
            "background comes first (1.x) or last (2.x)",
            "convert it with MMDetection 2.x's tools/model_converters/upgrade_model_version.py",
        )
    reordered = dict(tensors)
    for key in heads:
        by_shape = tensors[key].unflatten(0, (-1, num_channels))
        reordered[key] = by_shape.roll(-1, dims=1).flatten(0, 1)
    return reordered, f"of MMDetection {version}: background moved from the first place to the last"


def class_rows(num_rows: int, num_classes: int) -> Tensor:
    """Return the rows (classes, shapes) of each class in a class head.

    They are ordered by shape and, of a shape, by class.
    """
    num_channels = num_classes + 1  # background comes last
    shapes = torch.arange(num_rows // num_channels)
    return torch.arange(num_classes).unsqueeze(1) + shapes * num_channels


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, in any known layout, under the network's names."""
    return renamed(state, tensors_of(state), _network_key)


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

    Ours say which it is, others show it by the names of their tensors and the width by the first
    convolution. A backbone by itself changes nothing. Raise UserError for a detector of another
    model.
    """
    keys = network_keys(state)
    require_model(state, keys, Recipe.model, name_of(state))
    if recipe_entry(state):
        return replace(recipe, **recipe_fields(state, recipe, NETWORK))
    if not any(LAYOUT.class_head.fullmatch(key) for key in keys):
        return recipe
    preset = RECIPES["ssd512" if ONLY_IN_SSD512 in keys else "1p"]
    changes = {field: getattr(preset, field) for field in NETWORK}
    first = keys.get(FIRST_CONVOLUTION)
    if first is not None and first.ndim:
        changes["width"] = len(first) / CHANNELS_OF_FIRST_CONVOLUTION
    return replace(recipe, **changes)


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    tensors = network_keys(state)
    rows_of_one_class = 2 * SHAPES_OF_FIRST_MAP  # with background
    rows = rows_of(state, tensors, "bbox_head.cls_convs.0.bias", rows_of_one_class)
    channels = rows // SHAPES_OF_FIRST_MAP
    return channels - 1  # without background


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """Return a detector's class names, numbers where they are not known."""
    return class_names_or_numbers(state, num_classes_of(state))


def published_state_dict(model: nn.Module, since_2_14: bool = False) -> dict[str, Tensor]:
    """Return the weights as MMDetection's checkpoints have them: fp32 on the CPU, under its names.

    By default those before 2.14, which the port has; with `since_2_14` the later ones, 3.x
    included. MMDetection converts neither into the other while loading.
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


def published_file(state: Mapping, layout: str, recipe: Recipe) -> dict:
    """Return a checkpoint's detector as a file of MMDetection, in one of the LAYOUTS.

    `recipe` is that of the checkpoint. Raise UserError where it is not a whole detector.
    """
    model = build_model(recipe, num_classes_of(state))
    load_weights(model, state).require_complete(name_of(state))
    weights = published_state_dict(model, since_2_14=layout == "mmdet3")
    return mmdetection_file(weights, class_names_of(state), layout, Recipe.model)


def main(argv: list[str] | None = None) -> None:
    export_published(
        argv, "ssd_mmdet.weights", LAYOUTS, RECIPES, recipe_of_checkpoint, published_file
    )


if __name__ == "__main__":
    entry.run(main)
