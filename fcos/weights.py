"""Loading weights: our checkpoints, MMDetection 2.x's, and caffe ResNet-50 backbones.

The names in the network are the published ones (see model.py), so there is little to map: a
`module.` prefix of distributed runs is taken off, early names of the predictors are replaced, and
a backbone file's names get the prefix `backbone.`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
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
from fcos.config import DETECTRON2_MEAN, DETECTRON_MEAN, RECIPES, Recipe

EARLY_NAMES = {
    "fcos_cls": "conv_cls",
    "fcos_reg": "conv_reg",
    "fcos_centerness": "conv_centerness",
}
BACKBONE_MODULES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
# The tensors whose rows are classes.
CLASS_HEAD = re.compile(r"bbox_head\.conv_cls\.(weight|bias)")
# Fields of the recipe that the weights of a checkpoint belong to.
NETWORK = (
    "name",
    "backbone",
    "channels",
    "tower_convs",
    "head_norm",
    "conv_bias",
    "norm_on_bbox",
    "centerness_on_reg",
    "mean",
)
# Those of them in which the published presets differ.
PUBLISHED = ("head_norm", "conv_bias", "norm_on_bbox", "centerness_on_reg", "mean")
# The preset of a published detector, by what each of its towers' layers has: (norm, bias).
PRESETS = {(True, False): "gn", (False, True): "nogn", (True, True): "tricks"}


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Load a file or a state dict, in any of the known layouts, into the network.

    With `classes`, those of the network, the class heads of a detector of other classes are loaded
    class by class (`with_classes_of`). Tensors of another shape stay as initialised. Raise
    UserError for an unreadable file and for one whose backbone does not fit.
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
    for key in report.loaded:
        if key.startswith("backbone.") and key.endswith("weight"):
            return report
    raise UserError(
        f"{name_of(state)}: nothing in it fits the backbone; give a checkpoint of this detector, "
        "or caffe's ResNet-50 (resnet50_caffe-788b5fa3.pth)"
    )


def class_rows(num_rows: int, num_classes: int) -> Tensor:
    """Return the rows (classes, 1) of each class of the class head."""
    return torch.arange(num_classes).unsqueeze(1)


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, in any known layout, under the network's names."""
    tensors = tensors_of(state)
    if is_backbone(tensors):
        return _backbone_keys(tensors, name_of(state))
    renamed = {}
    for key, value in tensors.items():
        modules = key.split(".")
        if len(modules) > 1:
            modules[1] = EARLY_NAMES.get(modules[1], modules[1])
        renamed[".".join(modules)] = value
    return renamed


def is_backbone(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a ResNet by itself."""
    if not tensors:
        return False
    return all(key.split(".")[0] in BACKBONE_MODULES for key in tensors)


def _backbone_keys(tensors: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """Return a caffe ResNet under the network's names.

    Its batch norm is folded into factor and offset, so that statistics are 0 and 1. Biases of
    convolutions, which some files have, are left out where they are 0; others are reported as
    skipped. Raise UserError for another ResNet.
    """
    statistics = [value for key, value in tensors.items() if key.endswith("running_mean")]
    if "fc.weight" in tensors or any(value.any() for value in statistics):
        raise UserError(
            f"{file}: not caffe's ResNet-50 (its batch norm has statistics, as torchvision's: "
            "other strides and colours); give resnet50_caffe-788b5fa3.pth or "
            "resnet50_msra-5891d200.pth of MMDetection"
        )
    renamed = {}
    for key, value in tensors.items():
        if is_conv_bias(key) and not value.any():
            continue
        renamed[f"backbone.{key}"] = value
    return renamed


def is_conv_bias(key: str) -> bool:
    """Return whether a name in a ResNet is that of a convolution's bias."""
    path, _, parameter = key.rpartition(".")
    module = path.rpartition(".")[2]
    # The first layer of a shortcut, `downsample.0`, is a convolution as well.
    return parameter == "bias" and (module.startswith("conv") or module == "0")


def recipe_of_checkpoint(
    recipe: Recipe, state: Mapping, user_fields: Collection[str] = ()
) -> Recipe:
    """Return the recipe with the network of a checkpoint.

    Ours say which it is. Of a published detector the head shows which preset it belongs to; that is
    taken unless the head of `recipe` has the same tensors. A backbone changes nothing.

    The preset's `nms_iou`, which is not part of the network, is taken as well, unless the user has
    chosen one: it is among the `user_fields`, or `recipe` has a value that no preset has.
    """
    saved = state.get("recipe")
    if saved:
        return replace(recipe, **{field: saved[field] for field in NETWORK if field in saved})
    name = preset_taken(recipe, state)
    if name is None:
        return recipe
    preset = RECIPES[name]
    changes = {field: getattr(preset, field) for field in PUBLISHED}
    preset_values = [published.nms_iou for published in RECIPES.values()]
    if recipe.nms_iou in preset_values and "nms_iou" not in user_fields:
        changes["nms_iou"] = preset.nms_iou
    return replace(recipe, **changes)


def preset_taken(recipe: Recipe, state: Mapping) -> str | None:
    """Return the preset whose network a published detector has, where `recipe` has another head."""
    if state.get("recipe"):
        return None
    name = preset_of(state)
    if name is None or has_same_head(recipe, RECIPES[name]):
        return None
    return name


def note_on_preset(recipe: Recipe, state: Mapping) -> str | None:
    """Return a line that says which preset is taken instead of `recipe`, None where none is."""
    name = preset_taken(recipe, state)
    if name is None:
        return None
    return f"{name_of(state)}: has the head of --recipe={name}, which is taken"


def has_same_head(recipe: Recipe, other: Recipe) -> bool:
    """Return whether the heads of two recipes have the same tensors."""
    return _norm_and_bias(recipe) == _norm_and_bias(other)


def _norm_and_bias(recipe: Recipe) -> tuple[bool, bool]:
    """Return whether a layer of the head's towers has a norm and a bias; without a norm it does."""
    has_norm = recipe.head_norm != "none"
    return has_norm, recipe.conv_bias or not has_norm


def preset_of(state: Mapping) -> str | None:
    """Return the name of the published network whose head has a checkpoint's tensors, if any."""
    keys = network_keys(state)
    has_norm = "bbox_head.cls_convs.0.gn.weight" in keys
    has_bias = "bbox_head.cls_convs.0.conv.bias" in keys
    return PRESETS.get((has_norm, has_bias))


def with_mean_of(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the mean that the weights of a checkpoint were trained with."""
    mean = mean_of(state)
    if mean is None:
        return recipe
    return replace(recipe, mean=mean)


def mean_of(state: Mapping) -> tuple[float, float, float] | None:
    """Return the mean, BGR in 0..255, that the weights were trained with.

    Our checkpoints and backbone files show it; None for MMDetection's detectors, which have that
    of their recipe. Detectron's backbone has a bias for every convolution, Detectron2's for the
    first one.
    """
    if "recipe" in state:
        return tuple(state["recipe"]["mean"])
    tensors = tensors_of(state)
    if not is_backbone(tensors) or "conv1.bias" not in tensors:
        return None
    if "layer1.0.conv1.bias" in tensors:
        return DETECTRON_MEAN
    return DETECTRON2_MEAN


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    head = network_keys(state).get("bbox_head.conv_cls.weight")
    if head is None:
        raise UserError(f"{name_of(state)}: no detection heads; give a trained detector")
    return len(head)


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


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as MMDetection's checkpoints have them: fp32 on the CPU, its names."""
    return weights_on_cpu(model)
