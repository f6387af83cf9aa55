"""Every name of torch_npu that the project uses exists, in the list and in the package itself.

`torch_npu_names.txt` holds the public names of torch_npu 2.13.0, so most of this needs no NPU.
"""

import ast
import functools
import os
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDERS = ("common", "ssd_mmdet", "ssd_resnet34", "m2det", "fcos", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NAMES = set((HERE / "torch_npu_names.txt").read_text().splitlines())
WRITE_ONLY = {"torch.npu.config.allow_internal_format"}
PACKAGES = ("torch_npu", "torch.npu", "torch.ops.npu")


def test_ci_runs_the_simulation(missing):
    if os.environ.get("CI") == "true":
        assert missing is None, missing


class Uses(ast.NodeVisitor):
    """The dotted names of torch_npu in a module, as the list spells them.

    `getattr(torch, kind)`, where `kind` is no literal, is the module of whichever device: it
    stands for torch.npu too.
    """

    def __init__(self, source: str):
        self.found: set[str] = set()
        self._known = {"torch": "torch"}
        self.visit(ast.parse(source))

    def visit_Import(self, node):
        for alias in node.names:
            self._note(alias.name)
            self._known[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )

    def visit_ImportFrom(self, node):
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self._note(name)
            self._known[alias.asname or alias.name] = name

    def visit_Assign(self, node):
        self.generic_visit(node)
        name = self._name(node.value)
        if name in PACKAGES and isinstance(node.targets[0], ast.Name):
            self._known[node.targets[0].id] = name

    def visit_Attribute(self, node):
        name = self._name(node)
        if name is None:
            self.generic_visit(node)
        else:
            self._note(name)

    def visit_Call(self, node):
        self.generic_visit(node)
        called = self._name(node.func)
        if called == "torch.npu.set_option":
            self.found |= {f"option {key.value}" for key in node.args[0].keys}
        name = self._name(node)
        if name is not None:
            self._note(name)

    def _name(self, node) -> str | None:
        """What an expression is, as far as it is a module or part of one."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._name(node.value)
            return owner and f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
            owner, attribute = self._name(node.args[0]), node.args[1]
            if isinstance(attribute, ast.Constant):
                return owner and f"{owner}.{attribute.value}"
            return "torch.npu" if owner == "torch" else None
        return None

    def _note(self, name: str) -> None:
        if name.startswith("torch.ops.npu."):
            self.found.add("op npu::" + name.removeprefix("torch.ops.npu."))
        elif name.startswith(("torch_npu.", "torch.npu.")):
            self.found.add(name)


@functools.cache
def used(path: Path) -> frozenset[str]:
    return frozenset(Uses(path.read_text()).found)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\ntorch.npu.synchronize()", {"torch.npu.synchronize"}),
        ("import torch\ntorch.npu.Event(a=torch.npu.x)", {"torch.npu.Event", "torch.npu.x"}),
        ("import torch_npu as t\nt.npu_nms", {"torch_npu.npu_nms"}),
        ("from torch_npu.optim import A as B\nB.c", {"torch_npu.optim.A", "torch_npu.optim.A.c"}),
        ("import torch_npu\ngetattr(torch_npu, 'x').y", {"torch_npu.x.y"}),
        ("import torch\ngetattr(torch, kind).Event()", {"torch.npu.Event"}),
        ("import torch\nm = getattr(torch, kind)\nm.set_device(0)", {"torch.npu.set_device"}),
        ("import torch\ntorch.npu.config.a = False", {"torch.npu.config.a"}),
        ("import torch\ntorch.ops.npu.npu_iou(a, b)", {"op npu::npu_iou"}),
        ("import torch\ntorch.npu.set_option({'A': 1})", {"torch.npu.set_option", "option A"}),
        ("import torch\ntorch.nn.functional.relu(x)", set()),
    ],
)
def test_uses_are_found(source, names):
    assert Uses(source).found == names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_in_the_list(path):
    assert not used(path) - NAMES


def test_the_device_module_is_seen():
    names = used(ROOT / "common" / "npu" / "device.py")
    assert {f"torch.npu.{name}" for name in ("set_device", "max_memory_allocated")} <= names


def test_only_the_device_room_uses_torch_npu():
    users = {path for path in SOURCES if used(path)}
    assert {path.parent for path in users if "benchmarks" not in path.parts} == {
        ROOT / "common" / "npu"
    }


@pytest.mark.npu_sim
def test_names_are_in_the_package():
    import torch
    import torch_npu

    packages = {"torch": torch, "torch_npu": torch_npu}
    for name in set().union(*map(used, SOURCES)) - WRITE_ONLY:
        if name.startswith("op npu::"):
            assert hasattr(torch.ops.npu, name.removeprefix("op npu::").split(".")[0]), name
        elif not name.startswith("option "):
            package, *parts = name.split(".")
            functools.reduce(getattr, parts, packages[package])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ways_of_old_are_gone(path):
    old = r"torch\.npu_|transfer_to_npu|\.cuda\(|use_npu=|torch_npu\.contrib"
    assert not re.findall(old, path.read_text())
