"""Writing and checking ONNX files, whatever the network."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from common import export
from common.coco.detections import Detections
from common.coco.nms import class_nms
from common.errors import UserError


class Resized(nn.Module):
    """Nearest resizing by 2, 3 (1 to 3 pixels) and 5/3, as in feature pyramids."""

    def forward(self, images):
        maps = []
        for before, after in ((4, 8), (1, 3), (3, 5)):
            small = images[:, :, :before, :before]
            maps.append(nn.functional.interpolate(small, size=(after, after), mode="nearest"))
        return tuple(maps)


SUPPRESSION = export.Suppression(
    boxes="decoded_boxes",
    iou_boxes="decoded_boxes",
    iou=0.5,
    score_threshold=0.1,
    max_per_class=4,
    max_detections=4,
)


def detections(boxes, scores):
    """The detections of an image by the NMS in numpy."""
    label, box = np.nonzero(scores.numpy() > 0.1)
    kept = class_nms(boxes[box], scores[label, box], label, 0.5, 4)
    label = torch.from_numpy(label[kept])
    box = torch.from_numpy(box[kept])
    return Detections(boxes[box], scores[label, box], label)


def scored_images():
    """Two images: boxes that overlap, and of which the last share a score."""
    images = torch.zeros(2, 1, 3, 6)
    images[:, 0, 0] = torch.tensor([0.0, 1.0, 20.0, 21.0, 40.0, 60.0])
    images[0, 0, 1] = torch.tensor([0.9, 0.8, 0.3, 0.7, 0.2, 0.2])
    images[0, 0, 2] = torch.tensor([0.05, 0.6, 0.0, 0.0, 0.0, 0.0])
    images[1, 0, 1] = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    return images


def scored_graph():
    """A graph of six boxes whose left sides and scores, of two classes, are the pixels."""
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    scored (float[batch, 1, 3, 6] image)
        => (float[batch, 6, 4] decoded_boxes, float[batch, 2, 6] decoded_scores,
            float[batch, 2, 6] nms_scores)
    {
        rows = Constant <value = int64[3] {0, 3, 6}> ()
        flat = Reshape (image, rows)
        parts = Constant <value = int64[2] {1, 2}> ()
        left, decoded_scores = Split <axis = 1> (flat, parts)
        column = Transpose <perm = [0, 2, 1]> (left)
        zero = Constant <value = float {0.0}> ()
        side = Constant <value = float {10.0}> ()
        top = Mul (column, zero)
        right = Add (column, side)
        bottom = Add (top, side)
        decoded_boxes = Concat <axis = 2> (column, top, right, bottom)
        nms_scores = Identity (decoded_scores)
    }
    """
    return onnx.parser.parse_model(text)


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
    graph = onnx.helper.make_model(body, opset_imports=[opset], ir_version=8)

    right = export.compare(graph, lambda x: (x + np.float32(0.01),), images)
    assert right.startswith("same differ by 0.0e+00")
    with pytest.raises(UserError, match=r"network is wrong, same differ by 1\.0e-02"):
        export.compare(graph, lambda x: (x,), images)


def test_an_opset_out_of_reach_is_an_error_that_names_one_within():
    with pytest.raises(UserError, match=r"--opset 5: .*give --opset 17"):
        export.export_graph(Resized(), (8, 8), "image", "abc", opset=5)


@pytest.mark.parametrize(("opset", "batch"), [(17, 0), (17, 2), (11, 2)])
def test_resizes_are_constant_and_give_the_same_pixels(opset, batch):
    graph = export.export_graph(Resized().eval(), (8, 8), "image", "abc", opset, batch)
    assert graph.ir_version == 8
    assert [(used.domain, used.version) for used in graph.opset_import] == [("", opset)]
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("Resize") == 2
    assert "Shape" not in operators
    constants = {tensor.name for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Resize":
            modes = {attribute.name: attribute.s for attribute in node.attribute}
            assert modes["nearest_mode"] == b"round_prefer_ceil"
            assert constants.issuperset(node.input[1:])
            assert len(node.input) == (4 if batch else 3)  # sizes, or scales
    images = torch.rand(2, 3, 8, 8)
    exported = export.run_graph(graph, images)
    for expected, found in zip(Resized()(images), exported.values(), strict=True):
        assert torch.equal(found, expected)


def test_nms_in_the_graph_is_that_of_the_detectors():
    graph = scored_graph()
    images = scored_images()
    counts = export.compare_detections(graph, SUPPRESSION, images, detections)
    assert counts.startswith("4 detections, 0 other than the 4 of torch; 1 detections, 0 other")
    outputs = export.run_graph(export.with_nms(graph, SUPPRESSION), images)
    assert outputs["boxes"].shape == (2, 4, 4)
    assert outputs["scores"][0].tolist() == pytest.approx([0.9, 0.7, 0.6, 0.2])
    assert outputs["labels"][0].tolist() == [0, 0, 1, 0]
    assert outputs["boxes"][0, :3, 0].tolist() == [0, 21, 1]
    assert outputs["scores"][1].tolist() == pytest.approx([0.5, 0, 0, 0])

    wrong = SUPPRESSION._replace(iou=0.95)
    with pytest.raises(UserError, match=r"NMS is wrong: 4 detections, \d other than the 4"):
        export.compare_detections(graph, wrong, images, detections)


def test_detections_are_sets_where_the_list_is_full_and_scores_tie():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    scores = torch.tensor([0.9, 0.2, 0.2])
    labels = torch.tensor([0, 0, 0])
    first = (boxes[:2], scores[:2], labels[:2])
    other = (boxes[[0, 2]], scores[:2], labels[:2])
    assert export.count_without_counterpart(first, other, max_detections=2) == 0
    assert export.count_without_counterpart(first, other, max_detections=3) == 1
    another_class = (boxes[:2], scores[:2], labels[:2] + 1)
    assert export.count_without_counterpart(first, another_class, max_detections=2) == 1
    assert export.count_without_counterpart(first, (boxes, scores, labels), max_detections=4) == 1


def test_a_limit_in_fp32_is_not_above_the_detectors():
    assert float(export.largest_float32(0.5)) == 0.5
    for limit in (0.3, 0.45, 0.6, 0.65):
        assert limit - 1e-7 < float(export.largest_float32(limit)) <= limit


def test_a_variance_too_large_for_fp16_does_not_spoil_a_half_network():
    norm = nn.BatchNorm2d(3).eval()
    norm.running_var.fill_(1e6)
    images = torch.rand(1, 3, 4, 4) * 1000
    found = export.HalfPrecision(norm)(images)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), norm(images), rtol=0, atol=1e-3)
    assert norm.weight.dtype == torch.float32


def test_the_next_commands_name_file_and_shape(tmp_path):
    graph = scored_graph()
    path = tmp_path / "a.onnx"
    atc_910b, atc_310p, trtexec, ovc = export.next_commands(graph, path)
    assert f"--framework=5 --model={path} --output={tmp_path}/a " in atc_910b
    assert '--input_shape="image:1,1,3,6" --soc_version=Ascend910B' in atc_910b
    assert atc_310p.endswith("--soc_version=Ascend310P3")
    assert trtexec.endswith(" --shapes=image:1x1x3x6")  # the batch is free
    assert ovc == f"ovc {path} --output_model {tmp_path}/a.xml"
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert '"image:4,1,3,6"' in export.next_commands(graph, path)[0]
    assert "--shapes" not in export.next_commands(graph, path)[2]


def test_a_missing_package_is_named(monkeypatch):
    export.require_packages()
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"pip install no_such_package$"):
        export.require_packages()


class Divided(nn.Module):
    def forward(self, images):
        return images.split([1, 2], dim=1)


@pytest.mark.parametrize("opset", [18, 17, 15])
def test_a_tensor_may_be_split(opset):
    graph = export.export_graph(Divided().eval(), (4, 4), "image", "ab", opset)
    images = torch.rand(2, 3, 4, 4)
    exported = export.run_graph(graph, images)
    assert torch.equal(exported["a"], images[:, :1])
    assert torch.equal(exported["b"], images[:, 1:])


def test_torch_2_6_traces_what_it_cannot_export(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    export.require_packages()
    monkeypatch.setattr(export, "export_program", None)  # is not called
    graph = export.export_graph(Resized().eval(), (8, 8), "image", "abc", 17, batch=1)
    assert [used.version for used in graph.opset_import] == [17]


def test_images_to_check_with_are_repeated_up_to_the_number():
    inputs = export.inputs_to_check(None, lambda image: torch.tensor(image.shape), at_least=3)
    assert inputs.shape == (3, 3)
