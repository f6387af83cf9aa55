"""Exports with every version of torch that an Ascend host may have; they compute on the CPU."""

import pytest
import torch

from common.errors import UserError
from common.export import torch_version
from common.npu import checkpoint
from tests.small_models import ALL, module, run_state, small_recipe

pytestmark = [pytest.mark.npu_sim, pytest.mark.every_version]


def export(model, folder, *flags):
    """Export a small network with random weights, which the export checks; return the graph."""
    import onnx

    torch.manual_seed(0)
    network = module(model, "model").build_model(small_recipe(model), 3)
    checkpoint.save(folder / "iter_1.pt", run_state(model, network.state_dict()))
    program = "pthtar2onnx"
    if model == "fcos":
        program = "pthtar2onx"
        flags = ("--shape", "128", "160", *flags)
    file = folder / "network.onnx"
    weights = folder / "iter_1.pt"
    module(model, program).main([f"--checkpoint={weights}", f"--output_file={file}", *flags])
    return onnx.load(file)


@pytest.mark.parametrize("model", ALL)
def test_a_network_is_exported(model, tmp_path):
    graph = export(model, tmp_path, "--outputs=decoded")
    (opset_import,) = graph.opset_import
    assert opset_import.version == 17


def test_detections_are_exported_in_the_lowest_opset(tmp_path):
    graph = export("ssd_mmdet", tmp_path, "--outputs=detections", "--batch=2", "--opset=11")
    (opset_import,) = graph.opset_import
    assert opset_import.version == 11
    assert [value.name for value in graph.graph.output] == ["boxes", "scores", "labels"]


def test_free_sizes_need_a_later_torch(tmp_path):
    if torch_version() < (2, 7):
        with pytest.raises(UserError, match="cannot export a network of free height and width"):
            export("fcos", tmp_path, "--outputs=decoded", "--dynamic")
    else:
        export("fcos", tmp_path, "--outputs=decoded", "--dynamic")
