"""Loading weights: our checkpoints, the port's, and torchvision's ImageNet ResNets.

The network's own keys are the published ones (see model.py), so the maps are few: a `module.`
prefix of distributed runs goes, torchvision's names become positions of the trunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from common.npu import checkpoint

# torchvision's name: position in the trunk. Its layer4 and fc have no place here.
TORCHVISION = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5}


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

    Tensors of another shape stay as initialised. Raises UserError for an unreadable file or one of
    which nothing fits.
    """
    state = source if isinstance(source, Mapping) else checkpoint.load(source)
    given = network_keys(state)
    own = model.state_dict()
    if any(key.startswith("class_net.") and key not in own for key in given):
        name = state.get("path", "the state dict")
        raise UserError(
            f"{name}: a detector of the TFRecord recipe, whose padding and heads differ"
        )
    loaded, skipped, reinitialised = {}, [], []
    for key, value in given.items():
        if key not in own:
            skipped.append(key)
        elif own[key].shape != value.shape:
            reinitialised.append(key)
        else:
            loaded[key] = value
    if not any(key.endswith("weight") for key in loaded):
        name = state.get("path", "the state dict")
        raise UserError(f"{name}: no tensor fits this network; is it a checkpoint of another one?")
    model.load_state_dict(loaded, strict=False)
    missing = tuple(key for key in own if key not in given)
    return LoadReport(tuple(loaded), tuple(skipped), tuple(reinitialised), missing)


def network_keys(state: Mapping) -> dict[str, Tensor]:
    """The tensors of any known layout under the network's keys."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    renamed = {}
    for key, value in tensors.items():
        key = key.removeprefix("module.")
        first, _, rest = key.partition(".")
        if first in TORCHVISION:
            key = f"model.{TORCHVISION[first]}.{rest}"
        renamed[key] = value
    return renamed


def num_classes_of(state: Mapping) -> int:
    """Foreground classes of the detector in a checkpoint. Raises UserError where it has no head."""
    head = network_keys(state).get("mbox.0.weight")
    if head is None:
        raise UserError("the checkpoint has no detection heads; give one of a trained detector")
    # Per prior shape, of which the first map has 4: a channel per class, background, coordinate.
    return len(head) // 4 - 5


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """The class names in a checkpoint; the port's hold none: COCO's where there are 80 classes."""
    if "classes" in state:
        return tuple(state["classes"])
    count = num_classes_of(state)
    if count == len(COCO_CLASSES):
        return COCO_CLASSES
    return tuple(f"class_{label}" for label in range(count))


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights as the port's checkpoints have them: fp32 on the CPU, under its keys."""
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
