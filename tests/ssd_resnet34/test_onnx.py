"""The ONNX export: onnxruntime gives what torch gives, and the file says how to use it."""

import dataclasses
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from common.coco.images import read_image
from common.npu import checkpoint
from ssd_resnet34 import pthtar2onnx
from ssd_resnet34.anchors import make_anchors
from ssd_resnet34.config import Recipe
from ssd_resnet34.data import prepare_image
from ssd_resnet34.model import build_model
from ssd_resnet34.postprocess import decode_outputs, detect

PHOTOS = sorted(Path(__file__).parents[1].glob("data/tiny_coco/val2017/*.jpg"))[:2]
RECIPE = Recipe(backbone="resnet18")
NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(RECIPE, len(NAMES)).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "iter_3.pt"
    kept = {"model": model.state_dict(), "classes": NAMES}
    checkpoint.save(path, {**kept, "recipe": dataclasses.asdict(RECIPE)})
    return path


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([prepare_image(read_image(str(photo)), RECIPE) for photo in PHOTOS])


def run(file: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"image": images.numpy()})
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


def test_raw_outputs_lead_to_the_same_detections(weights, model, images, tmp_path, capsys):
    file = tmp_path / "new" / "raw.onnx"
    given = map(str, PHOTOS)
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", "--images", *given])
    assert "(3, 3, 300, 300): offsets differ by" in capsys.readouterr().out

    exported = run(file, images)
    assert list(exported) == ["offsets", "logits"]
    with torch.no_grad():
        outputs = model(images)
    for ours, theirs in zip(outputs, exported.values(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    sizes = torch.tensor([[300, 300], [480, 640]])
    ours, theirs = detect(outputs, sizes, RECIPE), detect(tuple(exported.values()), sizes, RECIPE)
    for expected, found in zip(ours, theirs, strict=True):
        assert len(expected.scores) > 20
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)

    graph = onnx.load(file)
    assert [used.version for used in graph.opset_import] == [17]
    assert len(graph.graph.node) < 100, "the graph is no longer folded"
    notes = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(notes["classes"]) == NAMES
    assert json.loads(notes["input_size"]) == [300, 300]
    assert json.loads(notes["mean"]) == list(RECIPE.mean)
    assert json.loads(notes["std"]) == list(RECIPE.std)


def test_decoded_outputs(weights, model, images, tmp_path):
    file = tmp_path / "decoded.onnx"
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", "--decoded"])
    exported = run(file, images)
    assert exported["boxes"].shape == (2, 8732, 4)
    assert exported["scores"].shape == (2, len(NAMES), 8732)
    with torch.no_grad():
        boxes, scores = decode_outputs(model(images), make_anchors(RECIPE), RECIPE)
    torch.testing.assert_close(exported["boxes"], boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported["scores"], scores, rtol=0, atol=1e-5)


def test_detections_of_a_fixed_batch(weights, model, images, tmp_path, capsys):
    file = tmp_path / "detections.onnx"
    flags = ["--outputs=detections", "--batch=2", "--opset=11"]
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", *flags])
    said = capsys.readouterr().out
    assert "with NMS, batch 2: 200 detections, 0 other than the 200 of torch; 200" in said
    assert '--input_shape="image:2,3,300,300"' in said
    graph = onnx.load(file)
    assert graph.ir_version == 8
    assert [(used.domain, used.version) for used in graph.opset_import] == [("", 11)]
    assert "Shape" not in {node.op_type for node in graph.graph.node}
    found = run(file, images)
    with torch.no_grad():
        own = detect(model(images), torch.tensor([[1, 1]] * 2), RECIPE)
    for i in range(2):
        torch.testing.assert_close(found["scores"][i], own[i].scores, rtol=0, atol=1e-5)
        same = (found["boxes"][i] - own[i].boxes).abs().amax(dim=1) < 1e-4
        assert (same & (found["labels"][i] == own[i].labels)).float().mean() > 0.9  # near ties swap


def test_half_precision(weights, model, images, tmp_path):
    file = tmp_path / "half.onnx"
    flags = ["--half", "--opset=13", "--batch=2"]
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", *flags])
    assert file.stat().st_size < 0.6 * weights.stat().st_size
    exported = run(file, images)
    with torch.no_grad():
        outputs = model(images)
    for expected, found in zip(outputs, exported.values(), strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - expected).abs().max() < 0.01 * expected.abs().max()
