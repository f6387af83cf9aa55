"""Writing and checking ONNX files, whatever the network."""

import numpy as np
import onnx
import pytest
import torch

from common import export
from common.errors import UserError


def test_a_wrong_export_is_found():
    """A graph that is off in one value stands for an export gone wrong."""
    offset = onnx.helper.make_tensor("offset", onnx.TensorProto.FLOAT, [1], [0.01])
    images = torch.rand(2, 3, 20, 30)
    shape = ["batch", 3, 20, 30]
    value = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("image", "same")
    ]
    add = onnx.helper.make_node("Add", ["image", "offset"], ["same"])
    body = onnx.helper.make_graph([add], "wrong", value[:1], value[1:], [offset])
    opset = onnx.helper.make_opsetid("", 17)
    graph = onnx.helper.make_model(body, opset_imports=[opset], ir_version=10)

    right = export.compare(graph, lambda x: (x + np.float32(0.01),), images)
    assert right.startswith("same differ by 0.0e+00")
    with pytest.raises(UserError, match=r"network is wrong, same differ by 1\.0e-02"):
        export.compare(graph, lambda x: (x,), images)


def test_an_opset_out_of_reach_is_an_error_that_names_one_within():
    class Doubled(torch.nn.Module):
        def forward(self, images):
            return images * 2

    with pytest.raises(UserError, match=r"--opset 5: .*give --opset 18"):
        export.export_graph(Doubled().eval(), (20, 30), "image", ["doubled"], opset=5)


def test_a_missing_package_is_named(monkeypatch):
    export.require_packages()
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"pip install no_such_package$"):
        export.require_packages()


def test_a_torch_that_cannot_export_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(UserError, match=r"torch 2.6.0\+cpu is too old: 2.7 is .* the ONNX export"):
        export.require_packages()


def test_images_to_check_with_are_repeated_up_to_the_number():
    inputs = export.inputs_to_check(None, lambda image: torch.tensor(image.shape), at_least=3)
    assert inputs.shape == (3, 3)
