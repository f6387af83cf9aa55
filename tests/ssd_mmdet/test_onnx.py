"""The ONNX export: onnxruntime gives what torch gives, and the file says how to use it."""

import dataclasses
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from common.coco.images import read_image
from common.errors import UserError
from common.npu import checkpoint
from ssd_mmdet import pthtar2onnx
from ssd_mmdet.anchors import make_anchors
from ssd_mmdet.config import RECIPES
from ssd_mmdet.data import prepare_image
from ssd_mmdet.model import build_model
from ssd_mmdet.postprocess import decode_outputs, detect

PHOTOS = sorted(Path(__file__).parents[1].glob("data/tiny_coco/val2017/*.jpg"))[:2]
RECIPE = dataclasses.replace(RECIPES["1p"], width=1 / 16)
NAMES = ["cat", "dog"]

pytestmark = pytest.mark.slow


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


def test_detections_and_the_flags_of_the_port(weights, model, images, tmp_path, capsys):
    file = tmp_path / "new" / "ssd300.onnx"
    given = [f"--checkpoint={weights}", f"--output_file={file}", "--shape", "300", "300"]
    old = (
        "--config configs/a.py --verify --opset-version 17 --mean 123.675 116.28 103.53 --std 1 1 1"
    )
    pthtar2onnx.main([*given, *old.split(), "--input-img", *map(str, PHOTOS)])
    said = capsys.readouterr().out
    assert "--config has no effect: the checkpoint shows its network" in said
    assert "(3, 3, 300, 300): decoded_boxes differ by" in said
    assert f"Successfully exported ONNX model: {file}" in said
    found = run(file, images)
    with torch.no_grad():
        own = detect(model(images), torch.tensor([[300, 300]] * 2), RECIPE)
    for i in range(2):
        assert len(own[i].scores) == 200
        torch.testing.assert_close(found["scores"][i], own[i].scores, rtol=0, atol=1e-5)
        assert found["labels"].dtype == torch.int64
        same = (found["boxes"][i] - own[i].boxes).abs().amax(dim=1) < 0.01
        assert (same & (found["labels"][i] == own[i].labels)).float().mean() > 0.9  # near ties swap
    notes = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    assert json.loads(notes["classes"]) == NAMES
    assert json.loads(notes["mean"]) == list(RECIPE.mean)


def test_boxes_and_scores_of_any_batch(weights, model, images, tmp_path):
    file = tmp_path / "decoded.onnx"
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", "--no_nms"])
    with torch.no_grad():
        boxes, scores = decode_outputs(model(images), make_anchors(RECIPE), RECIPE)
    found = run(file, images)
    assert found["boxes"].shape == (2, 8732, 4)
    torch.testing.assert_close(found["boxes"], boxes, rtol=0, atol=0.01)
    torch.testing.assert_close(found["scores"], scores, rtol=0, atol=1e-4)
    assert run(file, images[:1])["scores"].shape == (1, 8732, 2)


def test_another_normalisation_is_refused(weights):
    std = ("--std", "58.395", "57.12", "57.375")  # the old program's default, of another detector
    with pytest.raises(UserError, match=r"--mean 123\.675 116\.28 103\.53 --std 1 1 1; omit both"):
        pthtar2onnx.main([f"--checkpoint={weights}", *std])


def test_another_shape_is_refused(weights, tmp_path):
    with pytest.raises(UserError, match="this network takes 300 pixels"):
        pthtar2onnx.main([f"--checkpoint={weights}", "--shape", "800", "1216"])


@pytest.mark.parametrize(("opset", "outputs"), [(11, "detections"), (14, "raw")])
def test_a_fixed_batch_has_constant_shapes(opset, outputs, weights, tmp_path, capsys):
    file = tmp_path / "fixed.onnx"
    flags = ["--batch=2", f"--opset={opset}", f"--outputs={outputs}"]
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", *flags])
    assert '--input_shape="image:2,3,300,300"' in capsys.readouterr().out
    graph = onnx.load(file)
    assert graph.ir_version == 8
    assert [(used.domain, used.version) for used in graph.opset_import] == [("", opset)]
    assert not {"Shape", "Cast"}.intersection(node.op_type for node in graph.graph.node)
    for value in (*graph.graph.input, *graph.graph.output):
        assert all(size.dim_value for size in value.type.tensor_type.shape.dim)
