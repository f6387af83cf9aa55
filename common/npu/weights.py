"""Loading tensors into a network, and the report of what became of each of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
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
    changes: str = ""  # of the classes

    def __str__(self) -> str:
        missing = [name for name in self.missing if not name.endswith(COUNTER)]
        sentences = [
            f"{len(self.loaded)} tensors loaded",
            _count_and_names("skipped", self.skipped),
            _count_and_names("re-initialised (other shape)", self.reinitialised),
            _count_and_names("missing, left as initialised", missing),
            self.changes,
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


def load_matching(model: nn.Module, tensors: Mapping[str, Tensor], changes: str = "") -> LoadReport:
    """Load each tensor that the network has under the same name and in the same shape.

    `changes` is what the report says of the classes.
    """
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
    return LoadReport(tuple(loaded), tuple(skipped), tuple(reinitialised), tuple(missing), changes)


def with_classes_of(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    heads: list[str],
    class_rows: Callable[[int, int], Tensor],
    classes: Sequence[str],
    new_classes: Sequence[str],
) -> dict[str, Tensor]:
    """Return tensors whose class heads are those of the network's classes.

    `heads` are the names of their weights and biases, trained for `classes`. Of a head with as many
    rows, `class_rows(rows, classes)` gives the rows (classes, shapes) of each class at each anchor
    shape. A class of the same name keeps its rows, another has those that the network was
    initialised with; rows that belong to no class, of background and coordinates, are kept.
    """
    expected = model.state_dict()
    changed = dict(tensors)
    for name in heads:
        if name not in tensors or name not in expected:
            continue
        trained = tensors[name]
        head = expected[name].clone()
        old_rows = class_rows(len(trained), len(classes))
        new_rows = class_rows(len(head), len(new_classes))
        if old_rows.numel() == 0 or old_rows.max() >= len(trained):
            continue  # the names are not those of the head: reported as another shape
        old_others = _rows_besides(len(trained), old_rows)
        new_others = _rows_besides(len(head), new_rows)
        if len(old_others) != len(new_others) or trained.shape[1:] != head.shape[1:]:
            continue  # of another network: reported as another shape
        head[new_others] = trained[old_others].to(head)
        for label, class_name in enumerate(new_classes):
            if class_name in classes:
                rows = old_rows[classes.index(class_name)]
                head[new_rows[label]] = trained[rows].to(head)
        changed[name] = head
    return changed


def _rows_besides(count: int, rows: Tensor) -> Tensor:
    """Return the numbers below `count` that are not among `rows`."""
    is_left = torch.ones(count, dtype=torch.bool)
    is_left[rows.flatten()] = False
    return is_left.nonzero().flatten()


def class_changes(classes: Sequence[str], new_classes: Sequence[str]) -> str:
    """Return a line that says which classes of a detector another one keeps, empty for the same."""
    if list(classes) == list(new_classes):
        return ""
    kept = [name for name in new_classes if name in classes]
    initialised = [name for name in new_classes if name not in classes]
    dropped = [name for name in classes if name not in new_classes]
    parts = [
        _count_and_names("classes of the same name keep their weights", kept),
        _count_and_names("initialised anew", initialised),
        _count_and_names("dropped", dropped),
    ]
    return "; ".join(part for part in parts if part)


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
