"""Weights: our checkpoints, the original's, VGG-16 "reducedfc", torchvision's ResNets.

    python3 -m m2det.weights export best.pt m2det512_vgg.pth

writes a checkpoint in the original's form. The names in the network are the published ones (see
model.py), so there is little to map: a backbone's names get `base.` in front.
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
    recipe_entry,
    recipe_fields,
    renamed,
    require_numbers,
    rows_of,
    tensors_of,
    weights_on_cpu,
    with_classes_of,
)
from m2det.config import RECIPES, Recipe
from m2det.model import build_model

# vgg16_reducedfc.pth numbers its convolutions, torchvision's ResNets name theirs.
BACKBONE_KEY = re.compile(r"(\d+|conv1|bn1|layer[1-4]|fc)\.")
LAYOUT = Layout(
    class_head=re.compile(r"conf\.\d+\.(weight|bias)"),
    backbone="base.",
    unused=re.compile(r"(?!)"),  # nothing
    remedy="give a detector of m2det with its --recipe, vgg16_reducedfc.pth for a VGG, or "
    "torchvision's ResNet of --backbone",
)
LAYOUTS = ("m2det",)  # the original's, whose files are bare state dicts
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
# What earlier versions called some of them.
FORMER_NAMES = {field: field.replace("anchor_", "prior_") for field in NETWORK}
COORDINATES = 4


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
    """Return the rows (classes, shapes) of each class in a class head.

    They are ordered by shape and, of a shape, by class.
    """
    num_channels = 1 + num_classes  # background comes first
    shapes = torch.arange(num_rows // num_channels)
    return 1 + torch.arange(num_classes).unsqueeze(1) + shapes * num_channels


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, in any known layout, under the network's names."""
    return renamed(state, tensors_of(state), _network_key)


def _network_key(key: str) -> str:
    if BACKBONE_KEY.match(key):
        return f"base.{key}"
    return key


def recipe_of_checkpoint(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the network of a checkpoint.

    Ours say which it is. Of the original's detectors the names show whether they have an SFAM; the
    rest is that of `recipe`. A backbone by itself changes nothing. Checkpoints written before the
    anchors had that name call their fields `prior_*`. Raise UserError for a detector of another
    model.
    """
    keys = network_keys(state)
    require_model(state, keys, Recipe.model, name_of(state))
    changes = recipe_fields(state, recipe, NETWORK, FORMER_NAMES)
    if not recipe_entry(state) and any(LAYOUT.class_head.fullmatch(key) for key in keys):
        changes["sfam"] = any(key.startswith("sfam_module.") for key in keys)
    return replace(recipe, **changes)


def note_on_image_size(preset_name: str, recipe: Recipe, state: Mapping) -> str | None:
    """Return a line on a detector that does not say its image size, None for any other file.

    Detectors of all sizes have the same names and shapes, so that of the preset is taken, in
    `recipe`.
    """
    is_detector = any(LAYOUT.class_head.fullmatch(key) for key in network_keys(state))
    if not is_detector or "image_size" in recipe_entry(state):
        return None
    side = recipe.image_size
    return (
        f"{name_of(state)}: does not say its image size; {side} x {side} of "
        f"--recipe={preset_name} is taken"
    )


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    tensors = network_keys(state)
    num_shapes = rows_of(state, tensors, "loc.0.bias", COORDINATES) // COORDINATES
    rows_of_one_class = 2 * num_shapes  # with background
    channels = rows_of(state, tensors, "conf.0.bias", rows_of_one_class) // num_shapes
    return channels - 1  # without background


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """Return a detector's class names, numbers where they are not known."""
    return class_names_or_numbers(state, num_classes_of(state))


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as the original's checkpoints have them: fp32 on the CPU, its names."""
    return weights_on_cpu(model)


def published_file(state: Mapping, layout: str, recipe: Recipe) -> dict:
    """Return a checkpoint's detector as a file of the original.

    `recipe` is that of the checkpoint. Raise UserError where it is not a whole detector.
    """
    model = build_model(recipe, num_classes_of(state))
    load_weights(model, state).require_complete(name_of(state))
    return published_state_dict(model)


def main(argv: list[str] | None = None) -> None:
    export_published(argv, "m2det.weights", LAYOUTS, RECIPES, recipe_of_checkpoint, published_file)


if __name__ == "__main__":
    entry.run(main)
