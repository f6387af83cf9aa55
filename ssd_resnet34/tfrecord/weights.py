"""Loading weights: our checkpoints, TensorFlow's, and torchvision's ImageNet ResNet-34.

TensorFlow checkpoints are read, never written.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from common.errors import UserError
from common.npu import checkpoint
from common.npu.weights import (
    COUNTER,
    NAMES_SHOWN,
    LoadReport,
    load_matching,
    name_of,
    weights_on_cpu,
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
SCOPE = "resnet34/"  # of the backbone in a checkpoint of the whole detector
FIRST_BLOCK = 7  # number of the first extra block
FIRST_LEVEL = 3  # number of the first head
# Fields of the recipe that the weights of a checkpoint belong to.
NETWORK = ("name", "backbone")
SHAPES_OF_FIRST_MAP = 4


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load a detector or a backbone: file, state dict, or TensorFlow checkpoint (prefix, folder).

    What is not in the file stays as initialised, but the backbone must be complete. Raise
    UserError naming missing or misshapen weights, for an unreadable file, and for a detector of the
    COCO recipe.
    """
    prefix = None if isinstance(source, Mapping) else find_prefix(source)
    if prefix is not None:
        name = str(source)
        tensors = tensorflow_tensors(model, Bundle(prefix))
        shown_names = tensorflow_names(model)
    else:
        state = source if isinstance(source, Mapping) else checkpoint.load(source)
        name = name_of(state)
        tensors = network_keys(state)
        shown_names = {}
    if any(key.startswith("mbox.") for key in tensors):
        raise UserError(
            f"{name}: a detector of the COCO recipe, whose padding and heads differ; "
            "give a backbone or a detector of the TFRecord recipe"
        )
    expected = model.state_dict()
    missing = []
    misshapen = []
    for key, value in expected.items():
        if key not in tensors:
            if key.startswith("model.") and not key.endswith(COUNTER):
                missing.append(key)
        elif tensors[key].shape != value.shape:
            misshapen.append(key)
    if missing:
        raise UserError(f"{name}: lacks backbone weights: {list_names(missing, shown_names)}")
    if misshapen:
        raise UserError(f"{name}: weights of another shape: {list_names(misshapen, shown_names)}")
    report = load_matching(model, tensors)
    # TensorFlow does not count batches, and nothing reads the counters.
    kept = tuple(key for key in report.missing if not key.endswith(COUNTER))
    return replace(report, missing=kept)


def list_names(keys: list[str], shown_names: Mapping[str, str]) -> str:
    """Return the first of some keys, under the names that the file has for them."""
    text = ", ".join(shown_names.get(key, key) for key in keys[:NAMES_SHOWN])
    if len(keys) > NAMES_SHOWN:
        text += f" and {len(keys) - NAMES_SHOWN} more"
    return text


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


def tensorflow_tensors(model: nn.Module, bundle: Bundle) -> dict[str, Tensor | None]:
    """Return a checkpoint's weights under our names and in our layout.

    What the network does not have stands there as None, under its own name.
    """
    unused = set(bundle.names)
    tensors = {}
    for key, variable in tensorflow_names(model).items():
        for name in (SCOPE + variable, variable):
            if name in unused:
                unused.remove(name)
                tensors[key] = _in_our_layout(bundle.read(name).float())
                break
    for name in sorted(unused):
        tensors[name] = None
    return tensors


def _in_our_layout(value: Tensor) -> Tensor:
    if value.ndim != 4:
        return value
    # Kernels are stored as height, width, inputs, outputs.
    return value.permute(3, 2, 0, 1).contiguous()


def recipe_of_checkpoint(recipe: Recipe, state: Mapping) -> Recipe:
    """Return the recipe with the network and the categories that a checkpoint was trained with."""
    saved = state.get("recipe", {})
    changes = {field: saved[field] for field in NETWORK if field in saved}
    if "category_ids" in state:
        changes["category_ids"] = tuple(state["category_ids"])
    return replace(recipe, **changes)


def num_classes_of(state: Mapping) -> int:
    """Return the number of foreground classes of a checkpoint's detector.

    Raise UserError where it has no detection heads.
    """
    head = network_keys(state).get("class_net.0.weight")
    if head is None:
        raise UserError(f"{name_of(state)}: no detection heads; give a trained detector")
    channels = len(head) // SHAPES_OF_FIRST_MAP
    return channels - 1  # without background


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as our checkpoints have them: fp32 on the CPU."""
    return weights_on_cpu(model)
