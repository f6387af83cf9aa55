"""Loading tensors into a network, and the report of what became of each of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from common.errors import UserError

NAMES_SHOWN = 3  # of each kind in a report
COUNTER = "num_batches_tracked"  # of a batch normalisation that has a momentum: never read


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor; names are those of the network or, for `skipped`, of the file."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]  # in the file, not in the network
    reinitialised: tuple[str, ...]  # in both, in other shapes: left as initialised
    missing: tuple[str, ...]  # not in the file: left as initialised

    def __str__(self) -> str:
        missing = [name for name in self.missing if not name.endswith(COUNTER)]
        sentences = [
            f"{len(self.loaded)} tensors loaded",
            _count_and_names("skipped", self.skipped),
            _count_and_names("re-initialised (other shape)", self.reinitialised),
            _count_and_names("missing, left as initialised", missing),
        ]
        return "; ".join(sentence for sentence in sentences if sentence)

    def require_complete(self, name: str) -> "LoadReport":
        """Raise UserError, naming the file, unless every tensor of the network was loaded."""
        missing = [key for key in self.missing if not key.endswith(COUNTER)]
        if self.reinitialised or missing:
            raise UserError(f"{name}: {self}; give a detector trained on these classes")
        return self


def _count_and_names(event: str, names: tuple[str, ...] | list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:NAMES_SHOWN])
    if len(names) > NAMES_SHOWN:
        shown += f" and {len(names) - NAMES_SHOWN} more"
    return f"{len(names)} {event}: {shown}"


def load_matching(model: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Load each tensor that the network has under the same name and in the same shape."""
    expected = model.state_dict()
    loaded = {}
    skipped = []
    reinitialised = []
    for name, value in tensors.items():
        if name not in expected:
            skipped.append(name)
        elif value.shape != expected[name].shape:
            reinitialised.append(name)
        else:
            loaded[name] = value
    model.load_state_dict(loaded, strict=False)
    missing = [name for name in expected if name not in tensors]
    return LoadReport(tuple(loaded), tuple(skipped), tuple(reinitialised), tuple(missing))


def name_of(state: Mapping) -> str:
    """Return how messages call a checkpoint: its path, as `checkpoint.load` adds it."""
    return state.get("path", "the state dict")


def tensors_of(state: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint without what wraps them.

    They may lie under "model" (ours) or "state_dict" (MMDetection's), or at the top. A `module.`
    in front of the names, which distributed training leaves, is taken off.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name.removeprefix("module.")] = value
    return tensors


def weights_on_cpu(
    model: nn.Module, buffers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a copy of the network's state dict on the CPU.

    The `buffers` by name take the place of the network's own, under every name that a module
    shared by several parents has.
    """
    state = model.state_dict()
    replacements = {}
    for name, value in (buffers or {}).items():
        replacements[state[name].data_ptr()] = value
    copies = {}
    for name, value in state.items():
        replaced = replacements.get(value.data_ptr(), value)
        copies[name] = replaced.detach().cpu().clone()
    return copies


def require_num_classes(name: str, in_checkpoint: int, in_annotations: int) -> None:
    """Raise UserError, naming the file, where a detector has another number of classes."""
    if in_checkpoint != in_annotations:
        raise UserError(
            f"{name}: has {in_checkpoint} classes, the annotations have {in_annotations}; "
            "give a detector trained on these classes"
        )
