"""Weights: our checkpoints, MMDetection's, and caffe ResNet backbones.

    python3 -m fcos.weights export best.pt fcos.pth [--layout mmdet3]

writes a checkpoint in MMDetection's form. The names in the network are the published ones (see
model.py), so there is little to map: early names of the predictors are replaced, and a backbone
file's names get the prefix `backbone.`.
"""

if __name__ == "__main__":
    import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import re
from collections.abc import Collection, Mapping, Sequence
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
from fcos.backbone import STAGES
from fcos.config import DETECTRON2_MEAN, DETECTRON_MEAN, RECIPES, Recipe
from fcos.model import build_model

EARLY_NAMES = {
    "fcos_cls": "conv_cls",
    "fcos_reg": "conv_reg",
    "fcos_centerness": "conv_centerness",
}
# The first convolution of each block of a detector's backbone; the group is the stage.
FIRST_OF_BLOCK = re.compile(r"backbone\.layer([1-4])\.\d+\.conv1\.weight")
BACKBONE_MODULES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
LAYOUT = Layout(
    class_head=re.compile(r"bbox_head\.conv_cls\.(weight|bias)"),
    backbone="backbone.",
    # Biases of convolutions, which some backbone files have.
    unused=re.compile(r"backbone\.(.*\.)?(conv\d|downsample\.0)\.bias"),
    remedy="give a detector of fcos, one of MMDetection's with a caffe ResNet-50 or ResNet-101, or "
    "the caffe file of --backbone (bash download_weights.sh fcos lists them)",
)
# MMDetection's 2.x and 3.x, which have the same keys.
LAYOUTS = ("mmdet2", "mmdet3")
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
# Those of them that belong to the head of a published detector.
PUBLISHED = ("head_norm", "conv_bias", "norm_on_bbox", "centerness_on_reg", "mean")
# Those that decide what an evaluation measures, beside the network.
EVALUATION = ("img_scale", "eval_shapes", "nms_iou")
# The preset of a published detector, by what each of its towers' layers has: (norm, bias).
PRESETS = {(True, False): "gn", (False, True): "nogn", (True, True): "tricks"}


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Load a file or a state dict, in any of the known layouts, into the network.

    With `classes`, those of the network, the class heads of a detector of other classes are loaded
    class by class (`with_classes_of`). Class heads of another shape stay as initialised; anything
    else must fit. Raise UserError for an unreadable file and for one that does not fit, among them
    those with a backbone of torchvision's style.
    """
    state = source if isinstance(source, Mapping) else checkpoint.load(source)
    tensors = network_keys(state)
    require_model(state, tensors, Recipe.model, name_of(state))
    require_numbers(model, tensors, name_of(state))
    require_caffe_style(state, tensors)
    heads = [key for key in tensors if LAYOUT.class_head.fullmatch(key)]
    changes = ""
    trained = known_classes(state, num_classes_of(state)) if heads else None
    if heads and classes is not None:
        if trained is not None:
            tensors = with_classes_of(tensors, model, heads, class_rows, trained, classes)
        changes = class_changes(state, trained, classes)
    return load_whole(model, tensors, state, LAYOUT, changes)


def require_caffe_style(state: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for a file of another project whose ResNet is torchvision's.

    `tensors` have the network's names. Their shapes are the same, but the strides, the order of
    colours and the normalisation are not. Caffe's batch norm is folded into factor and offset, so
    that its statistics are 0 and 1; ours may have others where they were trained.
    """
    if recipe_entry(state) or state.get("written_by") == Recipe.model:
        return
    has_statistics = False
    for key, value in tensors.items():
        is_mean = key.startswith("backbone.") and key.endswith("running_mean")
        if is_mean and value.isfinite().all() and value.any():
            has_statistics = True
    if has_statistics or "backbone.fc.weight" in tensors:
        raise UserError(
            f"{name_of(state)}: not a caffe ResNet-50 or ResNet-101 (its batch norm has "
            "statistics, as torchvision's: other strides and colours)",
            LAYOUT.remedy,
        )


def class_rows(num_rows: int, num_classes: int) -> Tensor:
    """Return the rows (classes, 1) of each class of the class head."""
    return torch.arange(num_classes).unsqueeze(1)


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, in any known layout, under the network's names."""
    tensors = tensors_of(state)
    if is_backbone(tensors):
        return _backbone_keys(tensors)
    return renamed(state, tensors, _network_key)


def _network_key(key: str) -> str:
    modules = key.split(".")
    if len(modules) > 1:
        modules[1] = EARLY_NAMES.get(modules[1], modules[1])
    return ".".join(modules)


def is_backbone(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a ResNet by itself."""
    if not tensors:
        return False
    return all(key.split(".")[0] in BACKBONE_MODULES for key in tensors)


def _backbone_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a ResNet under the network's names.

    Biases of convolutions, which some caffe files have, are left out where they are 0; others are
    reported.
    """
    with_prefix = {}
    for key, value in tensors.items():
        name = f"backbone.{key}"
        if LAYOUT.unused.fullmatch(name) and not value.any():
            continue
        with_prefix[name] = value
    return with_prefix


def recipe_of_checkpoint(
    recipe: Recipe, state: Mapping, user_fields: Collection[str] = ()
) -> Recipe:
    """Return the recipe with the network of a checkpoint.

    Ours say which it is. Of a published detector the head shows which preset it belongs to; that is
    taken unless the head of `recipe` has the same tensors. The number of its blocks shows the
    backbone. A file of a backbone alone changes nothing.

    The preset's `nms_iou`, which is not part of the network, is taken as well, unless the user has
    chosen one: it is among the `user_fields`, or `recipe` has a value that no preset has. Raise
    UserError for a detector of another model.
    """
    require_model(state, network_keys(state), Recipe.model, name_of(state))
    if recipe_entry(state):
        return replace(recipe, **recipe_fields(state, recipe, NETWORK))
    changes = {}
    name = preset_taken(recipe, state)
    if name is not None:
        preset = RECIPES[name]
        for field in PUBLISHED:
            changes[field] = getattr(preset, field)
        preset_values = [published.nms_iou for published in RECIPES.values()]
        if recipe.nms_iou in preset_values and "nms_iou" not in user_fields:
            changes["nms_iou"] = preset.nms_iou
    backbone = backbone_taken(recipe, state)
    if backbone is not None:
        changes["backbone"] = backbone
    return replace(recipe, **changes)


def as_evaluated(recipe: Recipe, state: Mapping, user_fields: Collection[str] = ()) -> Recipe:
    """Return the recipe with the scale and the NMS of the evaluations in a checkpoint's own run.

    What the user has chosen, the `user_fields`, stays; files of other projects change nothing.
    """
    fields = [field for field in EVALUATION if field not in user_fields]
    return replace(recipe, **recipe_fields(state, recipe, fields))


def preset_taken(recipe: Recipe, state: Mapping) -> str | None:
    """Return the preset whose network a published detector has, where `recipe` has another head."""
    if recipe_entry(state):
        return None
    name = preset_of(state)
    if name is None or has_same_head(recipe, RECIPES[name]):
        return None
    return name


def backbone_taken(recipe: Recipe, state: Mapping) -> str | None:
    """Return the backbone of a published detector, where `recipe` has another one."""
    if recipe_entry(state) or not is_detector(state):
        return None
    backbone = backbone_of(state)
    if backbone == recipe.backbone:
        return None
    return backbone


def note_on_preset(recipe: Recipe, state: Mapping) -> str | None:
    """Return a line that says what of the network is not that of `recipe`, None where nothing is.

    Only for published detectors; ours say their network.
    """
    parts = []
    name = preset_taken(recipe, state)
    if name is not None:
        parts.append(f"the head of --recipe={name}")
    backbone = backbone_taken(recipe, state)
    if backbone is not None:
        parts.append(f"the backbone {backbone}")
    if not parts:
        return None
    verb = "is" if len(parts) == 1 else "are"
    return f"{name_of(state)}: has {' and '.join(parts)}, which {verb} taken"


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


def backbone_of(state: Mapping) -> str | None:
    """Return the name of the backbone whose number of blocks a detector has, if any."""
    depths = [0, 0, 0, 0]
    for key in network_keys(state):
        match = FIRST_OF_BLOCK.fullmatch(key)
        if match is not None:
            depths[int(match[1]) - 1] += 1
    for name, stages in STAGES.items():
        if stages == tuple(depths):
            return name
    return None


def with_mean_of(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the mean that the weights of a checkpoint were trained with."""
    mean = mean_of(state)
    if mean is None:
        return recipe
    return replace(recipe, mean=mean)


def decides_mean(state: Mapping, states: Sequence[Mapping]) -> bool:
    """Return whether the mean is that of `state`, one of the files that a run starts from.

    A detector decides, whether it says its mean or has that of the recipe: the mean that its
    backbone was trained with before does not count.
    """
    return is_detector(state) or not any(is_detector(other) for other in states)


def is_detector(state: Mapping) -> bool:
    """Return whether a checkpoint has the class head of a detector."""
    return any(LAYOUT.class_head.fullmatch(key) for key in network_keys(state))


def mean_of(state: Mapping) -> tuple[float, float, float] | None:
    """Return the mean, BGR in 0..255, that the weights were trained with.

    Our checkpoints and backbone files show it; None for MMDetection's detectors, which have that
    of their recipe. Detectron's backbone has a bias for every convolution, Detectron2's for the
    first one.
    """
    if recipe_entry(state):
        return recipe_fields(state, RECIPES["gn"], ["mean"]).get("mean")
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
    return rows_of(state, network_keys(state), "bbox_head.conv_cls.weight", 1)


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """Return a detector's class names, numbers where they are not known."""
    return class_names_or_numbers(state, num_classes_of(state))


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as MMDetection's checkpoints have them: fp32 on the CPU, its names."""
    return weights_on_cpu(model)


def published_file(state: Mapping, layout: str, recipe: Recipe) -> dict:
    """Return a checkpoint's detector as a file of MMDetection, in one of the LAYOUTS.

    `recipe` is that of the checkpoint. Raise UserError where it is not a whole detector.
    """
    model = build_model(recipe, num_classes_of(state))
    load_weights(model, state).require_complete(name_of(state))
    weights = published_state_dict(model)
    return mmdetection_file(weights, class_names_of(state), layout, Recipe.model)


def main(argv: list[str] | None = None) -> None:
    export_published(argv, "fcos.weights", LAYOUTS, RECIPES, recipe_of_checkpoint, published_file)


if __name__ == "__main__":
    entry.run(main)
