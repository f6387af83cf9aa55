"""Loading weights: our checkpoints, MMDetection 2.x's, and caffe ResNet-50 backbones.

The network's own keys are the published ones (see model.py), so the maps are few: a `module.`
prefix of distributed runs goes, early names of the predictors are renamed, a backbone file's keys
get the prefix `backbone.`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from common.npu import checkpoint
from fcos.config import DETECTRON2_MEAN, DETECTRON_MEAN

EARLY_NAMES = {
    "fcos_cls": "conv_cls",
    "fcos_reg": "conv_reg",
    "fcos_centerness": "conv_centerness",
}
BACKBONE = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor; names as in the network or, for `skipped`, in the file."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]  # in the file, not in the network
    reinitialised: tuple[str, ...]  # in both, of another shape: kept as initialised
    missing: tuple[str, ...]  # not in the file: kept as initialised

    def __str__(self) -> str:
        kept = [name for name in self.missing if not name.endswith("num_batches_tracked")]
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (
            ("skipped", self.skipped),
            ("re-initialised (other shape)", self.reinitialised),
            ("missing, left as initialised", kept),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{len(names)} {what}: {', '.join(names[:3])}{more}")
        return "; ".join(parts)

    def demand_all(self, name: str) -> "LoadReport":
        """Raise UserError unless every weight was loaded: a network without is not to be judged."""
        if self.reinitialised or any(key.endswith("weight") for key in self.missing):
            raise UserError(f"{name}: {self}; give a detector trained on these classes")
        return self


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load a file or state dict into the network, whatever of the known layouts it has.

    Tensors of another shape stay as initialised. Raises UserError for an unreadable file or one
    whose backbone does not fit.
    """
    state = source if isinstance(source, Mapping) else checkpoint.load(source)
    given = network_keys(state)
    own = model.state_dict()
    loaded, skipped, reinitialised = {}, [], []
    for key, value in given.items():
        if key not in own:
            skipped.append(key)
        elif own[key].shape != value.shape:
            reinitialised.append(key)
        else:
            loaded[key] = value
    if not any(key.startswith("backbone.") and key.endswith("weight") for key in loaded):
        name = state.get("path", "the state dict")
        raise UserError(
            f"{name}: nothing in it fits the backbone; give a checkpoint of this detector, or "
            "caffe's ResNet-50 (resnet50_caffe-788b5fa3.pth)"
        )
    model.load_state_dict(loaded, strict=False)
    missing = tuple(key for key in own if key not in given)
    return LoadReport(tuple(loaded), tuple(skipped), tuple(reinitialised), missing)


def tensors_of(state: Mapping) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whatever wraps them, without `module.`."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """The tensors of any known layout under the network's keys."""
    tensors = tensors_of(state)
    if is_backbone(tensors):
        return _of_backbone(tensors, state.get("path", "the state dict"))
    renamed = {}
    for key, value in tensors.items():
        parts = key.split(".")
        if len(parts) > 1:
            parts[1] = EARLY_NAMES.get(parts[1], parts[1])
        renamed[".".join(parts)] = value
    return renamed


def is_backbone(tensors: Mapping) -> bool:
    """Whether the keys are those of a bare ResNet."""
    return bool(tensors) and all(key.split(".")[0] in BACKBONE for key in tensors)


def _of_backbone(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A caffe ResNet under the network's keys. Its batch norm is folded into factor and offset,
    so statistics are 0 and 1; the biases of convolutions that some files have should be 0."""
    statistics = [value for key, value in tensors.items() if key.endswith("running_mean")]
    if "fc.weight" in tensors or any(value.any() for value in statistics):
        raise UserError(
            f"{name}: not caffe's ResNet-50 (its batch norm has statistics, as torchvision's: "
            "other strides and colours); give resnet50_caffe-788b5fa3.pth or "
            "resnet50_msra-5891d200.pth of MMDetection"
        )
    return {
        f"backbone.{key}": value
        for key, value in tensors.items()
        if not (_is_conv_bias(key) and not value.any())  # one that is not 0 is told as skipped
    }


def _is_conv_bias(key: str) -> bool:
    parts = key.split(".")
    return parts[-1] == "bias" and (parts[-2].startswith("conv") or parts[-2:-1] == ["0"])


def mean_of(state: Mapping) -> tuple[float, float, float] | None:
    """The mean that the weights were trained with, of our checkpoints and of backbone files; None
    where it does not show: MMDetection's detectors, which have that of their recipe.

    Detectron's backbone has a bias for every convolution, Detectron2's for the first one.
    """
    if "recipe" in state:
        return tuple(state["recipe"]["mean"])
    tensors = tensors_of(state)
    if not is_backbone(tensors) or "conv1.bias" not in tensors:
        return None
    detectron = "layer1.0.conv1.bias" in tensors
    return DETECTRON_MEAN if detectron else DETECTRON2_MEAN


def num_classes_of(state: Mapping) -> int:
    """Foreground classes of the detector in a checkpoint. Raises UserError where it has no head."""
    head = network_keys(state).get("bbox_head.conv_cls.weight")
    if head is None:
        raise UserError("the checkpoint has no detection head; give one of a trained detector")
    return len(head)


def preset_of(state: Mapping) -> str | None:
    """The name of the published network whose head has the keys of a checkpoint, if one has."""
    keys = network_keys(state)
    norm, bias = (f"bbox_head.cls_convs.0.{part}" in keys for part in ("gn.weight", "conv.bias"))
    return {(True, False): "gn", (False, True): "nogn", (True, True): "tricks"}.get((norm, bias))


def named_classes(state: Mapping) -> tuple[str, ...] | None:
    """The class names that a checkpoint holds, ours or MMDetection's (`meta.CLASSES`)."""
    meta = state.get("meta")
    names = state.get("classes") or (meta.get("CLASSES") if isinstance(meta, Mapping) else None)
    return tuple(names) if isinstance(names, list | tuple) else None


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """The class names in a checkpoint; of one that holds none COCO's where there are 80 classes."""
    names, count = named_classes(state), num_classes_of(state)
    if names is None and count == len(COCO_CLASSES):
        names = COCO_CLASSES
    return names or tuple(f"class_{label}" for label in range(count))


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights as MMDetection's checkpoints have them: fp32 on the CPU, under its keys."""
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
