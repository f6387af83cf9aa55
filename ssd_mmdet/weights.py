"""Loading weights: our checkpoints, MMDetection's of both key layouts, and VGG16 of Caffe.

The network's own keys are MMDetection's before 2.14 (see model.py); later releases moved the extra
layers to a neck and wrapped convolutions, with the same tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from common.coco.index import COCO_CLASSES
from common.errors import UserError
from common.npu import checkpoint

# Beginnings of keys from 2.14 on, and the same in the network: pattern, replacement.
SINCE_2_14 = (
    (r"neck\.l2_norm\.", r"backbone.l2_norm."),
    (r"(bbox_head\.(?:cls|reg)_convs\.\d+)\.0\.", r"\1."),
)
EXTRA_LAYER = re.compile(r"neck\.extra_layers\.(\d+)\.(\d+)\.conv\.")


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor; names as in the network or, for `skipped`, in the file."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]  # in the file, not in the network
    reinitialised: tuple[str, ...]  # in both, of another shape: kept as initialised
    missing: tuple[str, ...]  # not in the file: kept as initialised

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (
            ("skipped", self.skipped),
            ("re-initialised (other shape)", self.reinitialised),
            ("missing, left as initialised", self.missing),
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
    return {
        _network_key(key.removeprefix("module.")): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _network_key(key: str) -> str:
    if key.startswith("features."):  # a VGG16 by itself
        return f"backbone.{key}"
    for pattern, replacement in SINCE_2_14:
        key = re.sub(f"^{pattern}", replacement, key)
    return EXTRA_LAYER.sub(lambda at: f"backbone.extra.{2 * int(at[1]) + int(at[2])}.", key)


def num_classes_of(state: Mapping) -> int:
    """Foreground classes of the detector in a checkpoint. Raises UserError where it has no head."""
    head = network_keys(state).get("bbox_head.cls_convs.0.bias")
    if head is None:
        raise UserError("the checkpoint has no detection heads; give one of a trained detector")
    return len(head) // 4 - 1  # the first level has 4 shapes


def named_classes(state: Mapping) -> tuple[str, ...] | None:
    """The class names that a checkpoint holds: ours, MMDetection 2.x's (`meta.CLASSES`) or 3.x's
    (`meta.dataset_meta.classes`)."""

    def part(whole: object, key: str) -> object:
        return whole.get(key) if isinstance(whole, Mapping) else None

    meta = state.get("meta")
    found = (
        state.get("classes") or part(meta, "CLASSES") or part(part(meta, "dataset_meta"), "classes")
    )
    return tuple(found) if isinstance(found, list | tuple) else None


def class_names_of(state: Mapping) -> tuple[str, ...]:
    """The class names in a checkpoint; of one that holds none COCO's where there are 80 classes."""
    names, count = named_classes(state), num_classes_of(state)
    if names is None and count == len(COCO_CLASSES):
        names = COCO_CLASSES
    return names or tuple(f"class_{label}" for label in range(count))


def published_state_dict(model: nn.Module, since_2_14: bool = False) -> dict[str, Tensor]:
    """The weights as MMDetection's checkpoints have them: fp32 on the CPU, under its keys.

    By default those before 2.14, which the port has and later releases convert while loading;
    with `since_2_14` the later ones, 3.x included.
    """
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    return {_later_key(key): value for key, value in state.items()} if since_2_14 else state


def _later_key(key: str) -> str:
    key = key.replace("backbone.l2_norm.", "neck.l2_norm.")
    key = re.sub(r"(_convs\.\d+)\.", r"\1.0.", key)

    def neck(at: re.Match) -> str:
        return "neck.extra_layers.{}.{}.conv.".format(*divmod(int(at[1]), 2))

    return re.sub(r"^backbone\.extra\.(\d+)\.", neck, key)
