"""The ONNX export: what the file computes, and that its notes lead to the detector's detections."""

import dataclasses
import json

import onnx
import pytest
import torch

from common.coco.images import read_image
from common.export import run_graph
from common.npu import checkpoint
from ssd_resnet34.tfrecord import pthtar2onnx
from ssd_resnet34.tfrecord.config import RECIPES
from ssd_resnet34.tfrecord.data import prepare_image
from ssd_resnet34.tfrecord.detector import Detector
from ssd_resnet34.tfrecord.model import build_model

RECIPE = dataclasses.replace(RECIPES["small"], category_ids=(17, 18))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The checkpoint of a small detector with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "iter_3.pt"
    state = {
        "model": build_model(RECIPE, 2).state_dict(),
        "recipe": dataclasses.asdict(RECIPE),
        "category_ids": list(RECIPE.category_ids),
    }
    checkpoint.save(path, state)
    return path


@pytest.fixture(scope="module")
def detector(weights):
    return Detector.load(weights, "cpu")


@pytest.fixture(scope="module")
def photos(tiny_dir):
    return [read_image(str(path)) for path in sorted(tiny_dir.glob("val2017/*.jpg"))[:2]]


@pytest.fixture(scope="module")
def images(photos):
    return torch.stack([prepare_image(photo, RECIPE) for photo in photos])


def export(weights, file, *flags):
    """Export a checkpoint; return the graph and its notes."""
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", *flags])
    graph = onnx.load(file)
    return graph, {entry.key: entry.value for entry in graph.metadata_props}


def iou(box, others):
    """The IoU (n,) of a box (4,) with others (n, 4), xyxy."""
    top_left = torch.maximum(box[:2], others[:, :2])
    bottom_right = torch.minimum(box[2:], others[:, 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    area = (box[2:] - box[:2]).prod()
    other_areas = (others[:, 2:] - others[:, :2]).prod(dim=1)
    return overlap / (area + other_areas - overlap)


def nms_by_the_notes(boxes, scores, notes):
    """The best scores of an image, from boxes (P, 4) and scores (classes, P), as the notes say."""
    kept = []
    for class_scores in scores:
        order = class_scores.argsort(descending=True)
        order = order[class_scores[order] > json.loads(notes["score_threshold"])]
        order = order[: json.loads(notes["max_per_class"])]
        while len(order):
            best = order[0]
            kept.append(class_scores[best].item())
            rest = order[1:]
            order = rest[iou(boxes[best], boxes[rest]) < json.loads(notes["nms_iou"])]
    return sorted(kept, reverse=True)[: json.loads(notes["max_detections"])]


def test_raw_outputs(weights, detector, images, tmp_path):
    graph, notes = export(weights, tmp_path / "raw.onnx")
    exported = run_graph(graph, images)
    assert list(exported) == ["offsets", "logits"]
    with torch.no_grad():
        outputs = detector.model(images)
    for ours, theirs in zip(outputs, exported.values(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert json.loads(notes["classes"]) == ["17", "18"]
    assert json.loads(notes["input_size"]) == [300, 300]
    assert "output pixel i at input position i * size / 300" in notes["preprocessing"]


def test_decoded_outputs_and_the_notes_give_the_detections(
    weights, detector, photos, images, tmp_path
):
    graph, notes = export(weights, tmp_path / "decoded.onnx", "--decoded")
    exported = run_graph(graph, images)
    assert list(exported) == ["boxes", "scores"]
    with torch.no_grad():
        boxes, scores = pthtar2onnx.Decoded(detector.model, RECIPE)(images)
    torch.testing.assert_close(exported["boxes"], boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported["scores"], scores, rtol=0, atol=1e-5)
    assert json.loads(notes["clamp_boxes"]) is True
    assert (boxes >= 0).all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    assert "at least nms_iou" in notes["nms"]
    for i, found in enumerate(detector(photos)):
        expected = nms_by_the_notes(boxes[i], scores[i], notes)
        assert len(expected) > 20
        torch.testing.assert_close(found.scores, torch.tensor(expected), rtol=0, atol=1e-6)


def test_detections_are_those_of_the_detector(weights, detector, photos, images, tmp_path, capsys):
    flags = ("--outputs=detections", "--batch=2", "--opset=11")
    graph, _ = export(weights, tmp_path / "detections.onnx", *flags)
    assert "with NMS, batch 2: 200 detections, 0 other than" in capsys.readouterr().out
    assert graph.ir_version == 8
    assert [(used.domain, used.version) for used in graph.opset_import] == [("", 11)]
    assert "Shape" not in {node.op_type for node in graph.graph.node}
    exported = run_graph(graph, images)
    for i, found in enumerate(detector(photos)):
        height, width = photos[i].shape[:2]
        boxes = exported["boxes"][i] * torch.tensor([width, height, width, height])
        torch.testing.assert_close(exported["scores"][i], found.scores, rtol=0, atol=1e-5)
        same = (boxes - found.boxes).abs().amax(dim=1) < 0.1
        same &= exported["labels"][i] == found.labels
        assert same.float().mean() > 0.9  # near ties swap
