"""Loading weights: our checkpoints, TensorFlow's, and torchvision's ImageNet ResNet-34.

TensorFlow checkpoints are read, never written.
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
from common.npu.weights import (
    Layout,
    LoadReport,
    class_changes,
    load_whole,
    name_of,
    named_classes,
    recipe_fields,
    require_as_many,
    require_numbers,
    rows_of,
    shortened,
    weights_on_cpu,
    with_classes_of,
)
from ssd_resnet34.backbone import BasicBlock
from ssd_resnet34.tfrecord.bundle import Bundle, find_prefix
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.weights import network_keys

# TensorFlow's name for each tensor of a batch normalisation.
NORMS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# What TensorFlow keeps besides are its classifier, counters and the optimizer's state.
TENSORFLOW_WEIGHT = re.compile(
    r"(resnet34/)?(conv2d|batch_normalization)(_\d+)?/(kernel|gamma|beta|moving_\w+)"
    r"|ssd/.*/(kernel|bias)"
)
SCOPE = "resnet34/"  # of the backbone in a checkpoint of the whole detector
FIRST_BLOCK = 7  # number of the first extra block
FIRST_LEVEL = 3  # number of the first head
# Fields of the recipe that the weights of a checkpoint belong to.
NETWORK = ("name", "backbone")
SHAPES_OF_FIRST_MAP = 4
LAYOUT = Layout(
    class_head=re.compile(r"class_net\.\d+\.(weight|bias)"),
    backbone="model.",
    unused=re.compile(r"(layer4|fc)\..*"),
    remedy="give a detector of the TFRecord recipe, or TensorFlow's or torchvision's ResNet",
)


def read_weights(path: str | Path) -> dict:
    """Read weights to start from: TensorFlow's (prefix or folder) or a file of torch.save.

    Of TensorFlow's the result holds the Bundle under "bundle", with the "path". Raise UserError for
    what cannot be read.
    """
    prefix = find_prefix(path)
    if prefix is None:
        return checkpoint.load(path)
    return {"bundle": Bundle(prefix), "path": str(path)}


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Load a detector or a backbone: file, state dict, or TensorFlow checkpoint (prefix, folder).

    With `classes`, those of the network, the class heads of our detectors of other classes are
    loaded class by class (`with_classes_of`). Class heads of another shape stay as initialised, and
    all but the backbone where the file is a backbone; anything else must fit. Raise UserError for
    an unreadable file and for one that does not fit, among them detectors of the COCO recipe.
    """
    state = source if isinstance(source, Mapping) else read_weights(source)
    if "bundle" in state:
        tensors, not_used = tensorflow_tensors(model, state["bundle"])
        strange = [name for name in not_used if TENSORFLOW_WEIGHT.fullmatch(name)]
        if strange:
            raise UserError(
                f"{name_of(state)}: weights that are not of this network: {shortened(strange)}",
                LAYOUT.remedy,
            )
        require_numbers(model, tensors, name_of(state))
        report = load_whole(model, tensors, state, LAYOUT, shown_names=tensorflow_names(model))
        return replace(report, unknown=not_used)
    tensors = network_keys(state)
    require_model(state, tensors, Recipe.model, name_of(state))
    require_numbers(model, tensors, name_of(state))
    changes = ""
    heads = [key for key in tensors if LAYOUT.class_head.fullmatch(key)]
    names = named_classes(state)
    if heads and names is not None:
        require_as_many(state, "classes", len(names), num_classes_of(state))
    trained = trained_classes(state)
    if heads and classes is not None:
        if trained is not None:
            tensors = with_classes_of(tensors, model, heads, class_rows, trained, classes)
        changes = class_changes(state, trained, classes)
    return load_whole(model, tensors, state, LAYOUT, changes)


def trained_classes(state: Mapping) -> tuple[str, ...] | None:
    """Return the class names of a detector, None where it has none.

    Our earlier checkpoints have the category ids of own classes in the place of their names.
    """
    names = named_classes(state)
    ids = tuple(str(category_id) for category_id in _category_ids(state))
    return None if names == ids else names


def class_rows(num_rows: int, num_classes: int) -> Tensor:
    """Return the rows (classes, shapes) of each class in a head, ordered by shape, then class."""
    num_channels = 1 + num_classes
    channels = 1 + torch.arange(num_classes).unsqueeze(1)  # background comes first
    return channels + num_channels * torch.arange(num_rows // num_channels)


def tensorflow_names(model: nn.Module) -> dict[str, str]:
    """Return, for each of our names, TensorFlow's; the backbone's without its scope.

    TensorFlow numbers the backbone's layers as they were made, a projection before its block.
    """
    names = {}
    for number, (conv, norm) in enumerate(backbone_layers(model)):
        suffix = f"_{number}" if number else ""
        names[f"{conv}.weight"] = f"conv2d{suffix}/kernel"
        for theirs, ours in NORMS.items():
            names[f"{norm}.{ours}"] = f"batch_normalization{suffix}/{theirs}"
    for ours, theirs in _layers_of_extras_and_heads(model).items():
        names[f"{ours}.weight"] = f"{theirs}/kernel"
        names[f"{ours}.bias"] = f"{theirs}/bias"
    return names


def _layers_of_extras_and_heads(model: nn.Module) -> dict[str, str]:
    layers = {}
    for block in range(len(model.additional_blocks)):
        number = FIRST_BLOCK + block
        layers[f"additional_blocks.{block}.0"] = f"ssd/block{number}-conv1x1"
        layers[f"additional_blocks.{block}.2"] = f"ssd/block{number}-conv3x3"
    for level in range(len(model.class_net)):
        number = FIRST_LEVEL + level
        layers[f"class_net.{level}"] = f"ssd/class_net/class-{number}"
        layers[f"box_net.{level}"] = f"ssd/box_net/box-{number}"
    return layers


def backbone_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Return our names of each convolution and its normalisation, in TensorFlow's order."""
    layers = [("model.0", "model.1")]
    for name, module in model.model.named_modules(prefix="model"):
        if not isinstance(module, BasicBlock):
            continue
        if module.downsample is not None:
            layers.append((f"{name}.downsample.0", f"{name}.downsample.1"))
        layers.append((f"{name}.conv1", f"{name}.bn1"))
        layers.append((f"{name}.conv2", f"{name}.bn2"))
    return layers


def tensorflow_tensors(
    model: nn.Module, bundle: Bundle
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return a checkpoint's weights under our names and in our layout.

    The second value has the names of the variables that the network does not have.
    """
    unused = set(bundle.names)
    tensors = {}
    for key, variable in tensorflow_names(model).items():
        for name in (SCOPE + variable, variable):
            if name in unused:
                unused.remove(name)
                tensors[key] = _in_our_layout(bundle.read(name).float())
                break
    return tensors, tuple(sorted(unused))


def _in_our_layout(value: Tensor) -> Tensor:
    if value.ndim != 4:
        return value
    # Kernels are stored as height, width, inputs, outputs.
    return value.permute(3, 2, 0, 1).contiguous()


def recipe_of_checkpoint(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the network and the categories that a checkpoint was trained with.

    Other files do not say them: the recipe stays as it is. Raise UserError for a detector of
    another model.
    """
    keys = network_keys(state)
    require_model(state, keys, Recipe.model, name_of(state))
    changes = recipe_fields(state, recipe, NETWORK)
    ids = _category_ids(state)
    if ids:
        changes["category_ids"] = ids
        if any(LAYOUT.class_head.fullmatch(key) for key in keys):
            require_as_many(state, "category ids", len(ids), num_classes_of(state))
    return replace(recipe, **changes)


def _category_ids(state: Mapping) -> tuple[int, ...]:
    """Return the category ids of a checkpoint, none where it does not have that entry."""
    ids = state.get("category_ids", ())
    if not isinstance(ids, list | tuple) or not all(isinstance(ident, int) for ident in ids):
        raise UserError(
            f"{name_of(state)}: category_ids is {ids!r:.60}, not a list of integers",
            "correct the entry in the file, or remove it",
        )
    return tuple(ids)


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    rows_of_one_class = 2 * SHAPES_OF_FIRST_MAP  # with background
    rows = rows_of(state, network_keys(state), "class_net.0.weight", rows_of_one_class)
    channels = rows // SHAPES_OF_FIRST_MAP
    return channels - 1  # without background


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as our checkpoints have them: fp32 on the CPU."""
    return weights_on_cpu(model)


def main(argv: list[str] | None = None) -> None:
    """Answer `python3 -m ssd_resnet34.tfrecord.weights export`, which the other models have."""
    raise UserError(
        "the TFRecord recipe has no export: its original's form is a TensorFlow bundle, which is "
        "read and never written",
        "give its checkpoints to evaluate.py, pthtar2onnx.py or Detector.load as they are",
    )


if __name__ == "__main__":
    entry.run(main)
