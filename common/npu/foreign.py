"""Objects of foreign classes in checkpoints of other projects: inert stand-ins, no code is run.

A file is read twice. NameCollector unpickles it without tensors and makes a Placeholder class of
every name; an object that the pickle fills like a list or a dictionary notes that in its class. In
the second pass torch.load takes these classes, and builds plain lists and dictionaries of those.
"""

import io
import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from pathlib import Path

PICKLES_BEFORE_TORCH_1_6 = 4  # in a row in one file; the last one is what was saved


class Placeholder:
    """Stand for an object of an unknown class.

    A class whose objects the pickle fills like a list or a dictionary has that type as `container`,
    and its objects are plain ones: torch's restricted unpickler fills no others.
    """

    container: type | None = None

    def __new__(cls, *args):
        if cls.container is not None:
            return cls.container()
        return super().__new__(cls)

    def __init__(self, *args):
        """Take whatever the pickle gives."""

    def __setstate__(self, state):
        """Take whatever the pickle gives."""

    def __setitem__(self, key, value):
        type(self).container = OrderedDict

    def append(self, item):
        type(self).container = list

    def extend(self, items):
        type(self).container = list


def is_numpy(value: object) -> bool:
    """Return whether a value stands for an array or a number of NumPy."""
    return isinstance(value, Placeholder) and type(value).__module__.split(".")[0] == "numpy"


class NameCollector(pickle.Unpickler):
    """Unpickle without looking up a single name: each becomes a class of its own in `classes`."""

    def __init__(self, file: io.BytesIO, classes: dict[tuple[str, str], type]):
        super().__init__(file)
        self.classes = classes

    def find_class(self, module: str, name: str) -> type:
        full_name = (IMPORT_MAPPING.get(module, module), name)  # names of Python 2 under those of 3
        full_name = NAME_MAPPING.get((module, name), full_name)
        if full_name not in self.classes:
            module, name = full_name
            self.classes[full_name] = type(name, (Placeholder,), {"__module__": module})
        return self.classes[full_name]

    def persistent_load(self, pid: object) -> None:
        """Leave tensors out."""


def placeholder_classes(path: str | Path) -> list[type]:
    """Return a Placeholder class for each name in a checkpoint's pickle.

    Given to `torch.serialization.safe_globals`, they stand for the names that torch does not know;
    for those that it knows torch takes its own.
    """
    classes = {}
    for file in _pickles(path):
        NameCollector(file, classes).load()
    return list(classes.values())


def _pickles(path: str | Path) -> list[io.BytesIO]:
    if not zipfile.is_zipfile(path):
        # The same open file: each pickle begins where the one before it has ended.
        file = io.BytesIO(Path(path).read_bytes())
        return [file] * PICKLES_BEFORE_TORCH_1_6
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return [io.BytesIO(archive.read(name)) for name in names]
