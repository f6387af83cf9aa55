"""Loading weights: our checkpoints, the original's, VGG-16 "reducedfc", torchvision's ResNets.

The names in the network are the published ones (see model.py), so there is little to map: a
`module.` prefix of distributed runs is taken off, a backbone's names get `base.` in front.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from common.npu import checkpoint
from common.npu.weights import LoadReport, load_matching, name_of, tensors_of, weights_on_cpu
from m2det.config import Recipe

# vgg16_reducedfc.pth numbers its convolutions, torchvision's ResNets name theirs.
BACKBONE_KEY = re.compile(r"(\d+|conv1|bn1|layer[1-4]|fc)\.")
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


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load a file or a state dict, in any of the known layouts, into the network.

    Tensors of another shape stay as initialised. Raise UserError for an unreadable file and for one
    of which nothing fits.
    """
    state = source if isinstance(source, Mapping) else checkpoint.load(source)
    report = load_matching(model, network_keys(state))
    if not any(key.endswith("weight") for key in report.loaded):
        raise UserError(
            f"{name_of(state)}: no tensor fits this network; is it a checkpoint of another one?"
        )
    return report


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


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """Return a checkpoint's class names; where it holds none, COCO's if there are 80 classes."""
    names = named_classes(state)
    if names is not None:
        return names
    num_classes = num_classes_of(state)
    if num_classes == len(COCO_CLASSES):
        return COCO_CLASSES
    return tuple(f"class_{label}" for label in range(num_classes))


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as the original's checkpoints have them: fp32 on the CPU, its names."""
    return weights_on_cpu(model)
