"""Loading tensors into a network, and the report of what became of each of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.coco.class_names import spelled_as
from common.coco.index import COCO_CLASSES, read_annotations
from common.errors import UserError
from common.npu.identify import describe

NAMES_SHOWN = 3  # of each kind in a report
# What a file may have, or the network may, without any effect on what is computed: counters of
# batch normalisations that have a momentum, what thop and torch's averaged models count, the mean
# and deviation of MMDetection 3.x's input, and the shadow weights of MMCV's EMAHook.
NO_WEIGHT = re.compile(
    r"(.*\.)?(num_batches_tracked|total_ops|total_params)|n_averaged|data_preprocessor\.(mean|std)"
    r"|ema_.*"
)
# What a weight may be stored as; the 8-bit ones are scaled in ways of their own.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NO_CLASS_HEAD = re.compile(r"(?!)")  # fits no name
# Fields that the recipes of all models have had in every version.
FIELDS_OF_EVERY_RECIPE = ("name", "epochs", "batch_size", "lr")
# Under which a state dict may lie in a file, in this order; the last ones are of averaged weights.
WRAPPERS = (
    "model",
    "state_dict",
    "model_state_dict",
    "net",
    "weights",
    "ema",
    "module",
)


@dataclass(frozen=True)
class LoadReport:
    """What became of each weight; names are those of the network or, for `unknown`, of the file."""

    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...]  # class heads of another number of classes: left as initialised
    missing: tuple[str, ...]  # not in the file: left as initialised
    unknown: tuple[str, ...]  # in the file, not in the network: not used
    changes: str = ""  # of the classes
    averaged: bool = False  # whether the weights are averages over the steps of their training

    def __str__(self) -> str:
        loaded = f"{len(self.loaded)} tensors loaded"
        if self.averaged:
            loaded += ", the averages of --ema"
        sentences = [
            loaded,
            _count_and_names("re-initialised (another number of classes)", self.reinitialised),
            _count_and_names("missing, left as initialised", self.missing),
            _count_and_names("not used", self.unknown),
            self.changes,
        ]
        return "; ".join(sentence for sentence in sentences if sentence)

    def require_complete(self, name: str) -> "LoadReport":
        """Raise UserError, naming the file, unless it and the network have the same weights."""
        if self.missing or self.unknown:
            raise UserError(f"{name}: {self}", "give a detector with all weights of this network")
        if self.reinitialised:
            raise UserError(f"{name}: {self}", "give a detector trained on these classes")
        return self


def _count_and_names(event: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} {event}: {shortened(names)}"


def shortened(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    if len(names) > NAMES_SHOWN:
        shown += f" and {len(names) - NAMES_SHOWN} more"
    return shown


class Layout(NamedTuple):
    """What of a model's weights is what, by the names in its network."""

    class_head: re.Pattern  # the tensors whose rows are classes
    backbone: str  # beginning of the names of the backbone's tensors
    unused: re.Pattern  # what a backbone's file may have besides
    remedy: str  # which files fit


def load_whole(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    state: Mapping,
    layout: Layout,
    changes: str = "",
    shown_names: Mapping[str, str] | None = None,
) -> LoadReport:
    """Load a detector or a backbone into the network, whole or not at all.

    `tensors` are those of the checkpoint `state` under the network's names, and have passed
    `require_numbers`. A file with class heads is a detector: it must have the network's weights and
    no others, and only class heads may have another number of rows; those stay as initialised. Any
    other file is taken as a backbone, with whatever of the rest of the network it has: it must have
    all weights of the network's backbone, and no tensors that the network lacks but unused ones. Of
    the rest, what it has is loaded, and what it lacks stays as initialised; the report names that.
    `changes` is what the report says of the classes; `shown_names` are those that an error shows
    instead of the network's. Raise UserError where the file does not fit.
    """
    match = _match(model, tensors, layout.class_head)
    missing = match.missing
    unknown = match.unknown
    is_detector = any(layout.class_head.fullmatch(key) for key in tensors)
    if not is_detector:
        missing = [key for key in missing if key.startswith(layout.backbone)]
        unknown = [key for key in unknown if not layout.unused.fullmatch(key)]
    if match.misshapen or missing or unknown:
        difference = _difference(match._replace(missing=missing, unknown=unknown), shown_names)
        if not match.loaded:
            difference = f"no tensor fits this network ({_content(state)})"
        raise UserError(f"{name_of(state)}: {_what_file_is(state)}{difference}", layout.remedy)
    model.load_state_dict(match.loaded, strict=False)
    return LoadReport(
        loaded=tuple(match.loaded),
        reinitialised=tuple(match.reinitialised),
        missing=tuple(match.missing),
        unknown=tuple(match.unknown),
        changes=changes,
        averaged=bool(averages_of(state)),
    )


class _Match(NamedTuple):
    """Which tensors of a file a network has; names are those of the network."""

    loaded: dict[str, Tensor]
    reinitialised: list[str]  # class heads of another number of rows
    misshapen: dict[str, str]  # others of another shape, with the two shapes in words
    missing: list[str]
    unknown: list[str]


def _match(model: nn.Module, tensors: Mapping[str, Tensor], class_head: re.Pattern) -> _Match:
    expected = model.state_dict()
    match = _Match({}, [], {}, [], [])
    for key, value in tensors.items():
        if key not in expected:
            if not NO_WEIGHT.fullmatch(key):
                match.unknown.append(key)
        elif value.shape == expected[key].shape:
            match.loaded[key] = value
        elif class_head.fullmatch(key) and value.shape[1:] == expected[key].shape[1:]:
            match.reinitialised.append(key)
        else:
            shapes = f"{list(value.shape)} instead of {list(expected[key].shape)}"
            match.misshapen[key] = shapes
    for key in expected:
        if key not in tensors and not NO_WEIGHT.fullmatch(key):
            match.missing.append(key)
    return match


def _difference(match: _Match, shown_names: Mapping[str, str] | None) -> str:
    """Return in words how the weights of a file differ from a network's."""
    shown_names = shown_names or {}
    misshapen = [f"{shown_names.get(key, key)} {text}" for key, text in match.misshapen.items()]
    missing = [shown_names.get(key, key) for key in match.missing]
    differences = [
        _count_and_names("of another shape", misshapen),
        _count_and_names("missing", missing),
        _count_and_names("unknown", match.unknown),
    ]
    text = "; ".join(difference for difference in differences if difference)
    return f"its weights are not this network's: {text}"


def _what_file_is(state: Mapping) -> str:
    """Return what a file is, for a message; empty where the names of its tensors do not show it."""
    what = describe(tensors_of(state))
    return f"it is {what}; " if what else ""


def _content(state: Mapping) -> str:
    """Return which tensors a checkpoint has, or which entries where it has no tensors."""
    names = list(tensors_of(state))
    if names:
        return f"{len(names)} tensors: {shortened(names)}"
    entries = [str(key) for key in state if key != "path"]
    if entries:
        return f"no tensors; entries: {shortened(entries)}"
    return "no tensors"


def require_numbers(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise UserError, naming the file, where a weight is not a tensor of finite real numbers.

    Only those that the network reads count, by their names in `tensors`.
    """
    expected = model.state_dict()
    for key, value in tensors.items():
        if key not in expected or NO_WEIGHT.fullmatch(key):
            continue
        obstacle = _not_readable(value)
        if obstacle:
            raise UserError(
                f"{name}: {key} is {obstacle}, not of floating-point numbers",
                "save its weights as float32",
            )
        if not value.isfinite().all():
            raise UserError(
                f"{name}: {key} has values that are not finite numbers",
                "the training that wrote it had diverged; give an earlier checkpoint",
            )


def _not_readable(value: Tensor) -> str:
    """Return what kind of tensor cannot be a weight, empty for one that can."""
    if value.is_meta:
        return "on the device meta, without values"
    if value.layout is not torch.strided:
        return f"of the layout {str(value.layout).removeprefix('torch.')}"
    if value.dtype not in WEIGHT_DTYPES:
        return f"of the dtype {str(value.dtype).removeprefix('torch.')}"
    return ""


def load_same(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load the weights of a network that must be the same one, as a resumed run's is.

    Raise UserError, naming the file, where names or shapes differ, and for values that are not
    finite numbers.
    """
    require_numbers(model, tensors, name)
    match = _match(model, tensors, NO_CLASS_HEAD)
    if match.misshapen or match.missing or match.unknown:
        raise UserError(f"{name}: {_difference(match, None)}", "give the file as it was written")
    model.load_state_dict(tensors)


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
    shape. A class of the same name (`_` counts as a space) keeps its rows, another has those that
    the network was initialised with; rows that belong to no class, of background and coordinates,
    are kept.
    """
    classes = spelled_as(classes, new_classes)
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


def class_changes(state: Mapping, classes: Sequence[str] | None, new_classes: Sequence[str]) -> str:
    """Return a line that says which classes of a detector another one keeps, empty for the same.

    It also says where the names are not in the checkpoint `state`: `classes` are then those that
    are assumed, or None.
    """
    parts = []
    if classes is None:
        classes = new_classes
        parts.append("its class names are not in the file, the data's are assumed in their order")
    elif named_classes(state) is None:
        parts.append("its class names are not in the file, COCO's are assumed")
    classes = spelled_as(classes, new_classes)
    if classes != tuple(new_classes):
        kept = [name for name in new_classes if name in classes]
        initialised = [name for name in new_classes if name not in classes]
        dropped = [name for name in classes if name not in new_classes]
        parts += [
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

    They may lie under one of the `WRAPPERS`, or several of them in turn, or at the top. Of a run of
    ours with `--ema` they are the averages. `module.` in front of the names, which distributed
    training leaves, and `_orig_mod.`, which torch.compile does, are taken off. Raise UserError for
    a tensor without a name, and for two of the same.
    """
    content = averages_of(state) or state
    wrapper = _wrapper(content)
    while wrapper is not None:
        content = content[wrapper]
        wrapper = _wrapper(content)
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    for key in tensors:
        if not isinstance(key, str):
            raise UserError(
                f"{name_of(state)}: a tensor has the key {key!r}, which is not a name",
                "give a state dict, whose keys are the names of the tensors",
            )
    return renamed(state, tensors, _without_prefixes)


def averages_of(state: Mapping) -> Mapping:
    """Return what `RunState` wrote of a run's averaged weights, empty where it had none.

    Other projects have an entry "ema" as well, and no recipe of ours.
    """
    entry = mapping(state.get("ema"))
    if recipe_entry(state) and isinstance(entry.get("model"), Mapping):
        return entry
    return {}


def _without_prefixes(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def renamed(
    state: Mapping, tensors: Mapping[str, Tensor], new_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under other names.

    Raise UserError, naming the file, where two of them would have the same name.
    """
    result = {}
    old_names = {}
    for old_name, value in tensors.items():
        name = new_name(old_name)
        if name in result:
            raise UserError(
                f"{name_of(state)}: {old_names[name]} and {old_name} are the same weight",
                "remove one of them from the file",
            )
        result[name] = value
        old_names[name] = old_name
    return result


def _wrapper(state: Mapping) -> str | None:
    """Return under which wrapper the tensors of a mapping lie, None where there is none."""
    for wrapper in WRAPPERS:
        content = state.get(wrapper)
        if isinstance(content, Mapping) and _holds_tensors(content):
            return wrapper
    return None


def _holds_tensors(content: Mapping) -> bool:
    """Return whether a mapping has tensors, itself or under a wrapper."""
    has_tensor = any(isinstance(value, Tensor) for value in content.values())
    return has_tensor or _wrapper(content) is not None


def mapping(value: object) -> Mapping:
    """Return a value that is a mapping, an empty one in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def no_heads(state: Mapping) -> UserError:
    """Return the error of a file that is to be a detector and has no detection heads."""
    problem = f"{name_of(state)}: {_what_file_is(state)}no detection heads ({_content(state)})"
    return UserError(problem, "give a trained detector")


def named_classes(state: Mapping) -> tuple[str, ...] | None:
    """Return the class names that a checkpoint holds, None where it holds none.

    Ours have `classes`, MMDetection 2.x's `meta.CLASSES`, 3.x's `meta.dataset_meta.classes`, early
    ones of those `meta.dataset_meta.CLASSES`.
    """
    meta = mapping(state.get("meta"))
    dataset_meta = mapping(meta.get("dataset_meta"))
    candidates = (
        state.get("classes"),
        meta.get("CLASSES"),
        dataset_meta.get("classes"),
        dataset_meta.get("CLASSES"),
    )
    for names in candidates:
        if isinstance(names, str) and names:  # ("person") without a comma
            return (names,)
        if isinstance(names, list | tuple) and names:
            return tuple(str(name) for name in names)
    return None


def known_classes(state: Mapping, num_classes: int) -> tuple[str, ...] | None:
    """Return a detector's class names; where it holds none, COCO's if there are 80 classes.

    Raise UserError where it names another number of classes than its heads have.
    """
    names = named_classes(state)
    if names is None and num_classes == len(COCO_CLASSES):
        return COCO_CLASSES
    if names is not None:
        require_as_many(state, "classes", len(names), num_classes)
    return names


def require_as_many(state: Mapping, what: str, in_file: int, in_heads: int) -> None:
    """Raise UserError where a file lists another number of classes than its heads have."""
    if in_file != in_heads:
        raise UserError(
            f"{name_of(state)} names {in_file} {what}, its heads have {in_heads} classes",
            "correct the names in the file, or remove them",
        )


def class_names_or_numbers(state: Mapping, num_classes: int) -> tuple[str, ...]:
    """Return a detector's class names, numbers where they are not known."""
    names = known_classes(state, num_classes)
    if names is not None:
        return names
    return tuple(f"class_{label}" for label in range(num_classes))


def classes_to_evaluate(
    state: Mapping, num_classes: int, annotation_file: str
) -> tuple[str, ...] | None:
    """Return the class names with which to read a val set, None for those of its file.

    They are the detector's. Where it holds none and has 80 classes, COCO's are taken, unless the
    val set has 80 others.
    """
    names = known_classes(state, num_classes)
    if names is None or named_classes(state) is not None:
        return names
    in_file = read_annotations(annotation_file).class_names
    is_coco = set(spelled_as(in_file, names)) == set(names)
    if len(in_file) == num_classes and not is_coco:
        return None
    return names


def notes_on_class_names(state: Mapping, class_names: Sequence[str]) -> list[str]:
    """Return a line that says which class names are assumed, none where the file has its own."""
    if named_classes(state) is not None:
        return []
    assumed = shortened(class_names)
    if spelled_as(class_names, COCO_CLASSES) == COCO_CLASSES:
        assumed = f"COCO's ({assumed})"
    return [f"{name_of(state)}: its class names are not in the file; assumed: {assumed}"]


def rows_of(
    state: Mapping, tensors: Mapping[str, Tensor], name: str, rows_of_one_class: int
) -> int:
    """Return the number of rows of a head's tensor, which are at least those of one class.

    Raise UserError, naming the file, where it lacks the tensor or that has fewer rows.
    """
    head = tensors.get(name)
    if head is None:
        raise no_heads(state)
    if head.ndim == 0:
        raise UserError(
            f"{name_of(state)}: {name} is a single number, not a head", "give a trained detector"
        )
    if len(head) < rows_of_one_class:
        raise UserError(
            f"{name_of(state)}: {name} has {len(head)} rows, fewer than the {rows_of_one_class} of "
            "one class",
            "give a trained detector",
        )
    return len(head)


def recipe_entry(state: Mapping) -> Mapping:
    """Return the recipe that a checkpoint of ours holds, an empty mapping where it holds none.

    What another project calls `recipe` does not have the fields of every recipe of ours.
    """
    entry = mapping(state.get("recipe"))
    if all(field in entry for field in FIELDS_OF_EVERY_RECIPE):
        return entry
    return {}


def recipe_fields(
    state: Mapping, recipe, fields: Sequence[str], former_names: Mapping[str, str] | None = None
) -> dict[str, object]:
    """Return those of the fields that a checkpoint's recipe has, as changes to `recipe`.

    `former_names` are what earlier versions called some of them. Raise UserError, naming the file,
    for a value of another type than that of `recipe`.
    """
    entry = recipe_entry(state)
    former_names = former_names or {}
    changes = {}
    for field in fields:
        name = field
        if field not in entry:
            name = former_names.get(field, field)
        if name not in entry:
            continue
        value = entry[name]
        if not _is_like(value, getattr(recipe, field)):
            raise UserError(
                f"{name_of(state)}: its recipe has {name} = {value!r:.60}",
                "give a checkpoint as train.py wrote it",
            )
        changes[field] = value
    return changes


def _is_like(value: object, example: object) -> bool:
    """Return whether a value is of an example's type; numbers and sequences are alike."""
    if isinstance(example, list | tuple):
        if not isinstance(value, list | tuple):
            return False
        return not example or all(_is_like(element, example[0]) for element in value)
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(example, int | float):
        return isinstance(value, int | float)
    return isinstance(value, type(example))


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
