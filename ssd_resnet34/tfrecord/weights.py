"""Loading weights: our checkpoints, TensorFlow's, and torchvision's ImageNet ResNet-34.

TensorFlow checkpoints are read, never written.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from common.errors import UserError
from common.npu import checkpoint
from ssd_resnet34.backbone import BasicBlock
from ssd_resnet34.tfrecord.bundle import Bundle, find_prefix
from ssd_resnet34.weights import LoadReport, network_keys

# TensorFlow's name for each part of a batch normalisation.
NORMS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
SCOPE = "resnet34/"  # of the backbone in a checkpoint of the whole detector
FIRST_BLOCK, FIRST_LEVEL = 7, 3  # numbers of the first extra block and of the first head


def tensorflow_names(model: nn.Module) -> dict[str, str]:
    """Our key: TensorFlow's variable, for every weight; the backbone's without its scope.

    TensorFlow numbers the backbone's layers as they were made, a projection before its block.
    """
    names = {}
    for number, (conv, norm) in enumerate(_backbone_layers(model)):
        suffix = f"_{number}" if number else ""
        names[f"{conv}.weight"] = f"conv2d{suffix}/kernel"
        for theirs, ours in NORMS.items():
            names[f"{norm}.{ours}"] = f"batch_normalization{suffix}/{theirs}"
    layers = {}
    for block in range(len(model.additional_blocks)):
        for position, kind in ((0, "conv1x1"), (2, "conv3x3")):
            ours = f"additional_blocks.{block}.{position}"
            layers[ours] = f"ssd/block{FIRST_BLOCK + block}-{kind}"
    for level in range(len(model.class_net)):
        layers[f"class_net.{level}"] = f"ssd/class_net/class-{FIRST_LEVEL + level}"
        layers[f"box_net.{level}"] = f"ssd/box_net/box-{FIRST_LEVEL + level}"
    for ours, theirs in layers.items():
        names[f"{ours}.weight"] = f"{theirs}/kernel"
        names[f"{ours}.bias"] = f"{theirs}/bias"
    return names


def _backbone_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Keys of each convolution and its normalisation, in TensorFlow's order."""
    layers = [("model.0", "model.1")]
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, BasicBlock):
            if module.downsample is not None:
                layers.append((f"{name}.downsample.0", f"{name}.downsample.1"))
            layers += [(f"{name}.conv{k}", f"{name}.bn{k}") for k in (1, 2)]
    return layers


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load a detector or a backbone: file, state dict, or TensorFlow checkpoint (prefix, folder).

    What is not in the file stays as initialised, but the backbone must be there whole. Raises
    UserError naming missing or misshapen backbone weights, for an unreadable file, and for heads
    of another number of classes.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    prefix = None if isinstance(source, Mapping) else find_prefix(source)
    if prefix is None:
        state = source if isinstance(source, Mapping) else checkpoint.load(source)
        given = network_keys(state)
    else:
        given = _tensorflow_state(model, Bundle(prefix))
    if any(key.startswith("mbox.") for key in given):
        raise UserError(
            f"{name}: a detector of the other recipe, whose padding and heads differ; "
            "give a backbone or a checkpoint of this one"
        )
    own = model.state_dict()
    counters = [key for key in own if key.endswith("num_batches_tracked")]
    needed = [key for key in own if key.startswith("model.") and key not in counters]
    if missing := [key for key in needed if key not in given]:
        raise UserError(f"{name}: lacks backbone weights: {_few(missing, prefix, model)}")
    loaded = {key: value for key, value in given.items() if key in own}
    if bad := [key for key, value in loaded.items() if own[key].shape != value.shape]:
        raise UserError(f"{name}: weights of another shape: {_few(bad, prefix, model)}")
    model.load_state_dict(loaded, strict=False)
    skipped = tuple(key for key in given if key not in own)
    kept = tuple(key for key in own if key not in given and key not in counters)
    return LoadReport(tuple(loaded), skipped, (), kept)


def _tensorflow_state(model: nn.Module, bundle: Bundle) -> dict[str, Tensor]:
    """A checkpoint's weights under our keys and in our layout; the rest under its own names."""
    theirs = set(bundle.names)
    state = {}
    for key, variable in tensorflow_names(model).items():
        variable = next((name for name in (SCOPE + variable, variable) if name in theirs), None)
        if variable is None:
            continue
        theirs.remove(variable)
        value = bundle.read(variable).float()
        # Kernels are stored height, width, inputs, outputs.
        state[key] = value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value
    return state | dict.fromkeys(sorted(theirs))


def _few(keys: list[str], prefix: str | None, model: nn.Module) -> str:
    """The first of some keys, as the file calls them."""
    names = tensorflow_names(model) if prefix else {}
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(names.get(key, key) for key in keys[:5]) + more


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights as our checkpoints have them: fp32 on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
