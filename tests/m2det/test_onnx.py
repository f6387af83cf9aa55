"""The ONNX export: onnxruntime gives what torch gives, and the file says how to use it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from common.coco.images import read_image
from common.npu import checkpoint
from m2det import pthtar2onnx
from m2det.anchors import make_anchors
from m2det.config import RECIPES
from m2det.data import prepare_image
from m2det.model import build_model
from m2det.postprocess import decode_outputs, detect

PHOTOS = sorted(Path(__file__).parents[1].glob("data/tiny_coco/val2017/*.jpg"))[:2]
RECIPE = dataclasses.replace(RECIPES["quickstart"], sfam=True)
NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(RECIPE, len(NAMES)).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "iter_3.pt"
    state = {"model": model.state_dict(), "classes": NAMES, "recipe": dataclasses.asdict(RECIPE)}
    checkpoint.save(path, state)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.stack([prepare_image(read_image(str(photo)), RECIPE) for photo in PHOTOS])


def run(file, images):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"image": images.numpy()})
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


def test_raw_outputs_lead_to_the_same_detections(weights, model, images, tmp_path, capsys):
    file = tmp_path / "new" / "raw.onnx"
    given = map(str, PHOTOS)
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", "--images", *given])
    assert "(3, 3, 320, 320): offsets differ by" in capsys.readouterr().out
    exported = run(file, images)
    assert set(exported) == {"offsets", "logits"}
    with torch.no_grad():
        outputs = model(images)
    sizes = torch.tensor([[480, 640], [300, 500]])
    recipe = dataclasses.replace(RECIPE, score_threshold=0.4)
    ours = detect(outputs, sizes, recipe)
    theirs = detect(tuple(exported.values()), sizes, recipe)
    for one, other in zip(ours, theirs, strict=True):
        assert len(one.scores)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)

    notes = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(notes["classes"]) == NAMES
    assert json.loads(notes["mean"]) == [104, 117, 123]
    assert json.loads(notes["input_size"]) == [320, 320]


def test_decoded_boxes_and_scores(weights, model, images, tmp_path):
    file = tmp_path / "decoded.onnx"
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", "--decoded"])
    exported = run(file, images[:1])
    with torch.no_grad():
        boxes, scores = decode_outputs(model(images[:1]), make_anchors(RECIPE), RECIPE)
    np.testing.assert_allclose(exported["boxes"], boxes, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(exported["scores"], scores, atol=1e-4)
    assert exported["scores"].shape[2] == 1 + len(NAMES)
    notes = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert notes["scores"] == "probabilities: background, then the classes"


def test_detections_of_a_fixed_batch(weights, model, images, tmp_path, capsys):
    file = tmp_path / "detections.onnx"
    flags = ["--outputs=detections", "--batch=2", "--opset=11"]
    pthtar2onnx.main([f"--checkpoint={weights}", f"--output_file={file}", *flags])
    said = capsys.readouterr().out
    assert "the NMS inside is that of --nms=hard" in said
    assert "with NMS, batch 2: " in said
    assert '--input_shape="image:2,3,320,320"' in said
    graph = onnx.load(file)
    assert graph.ir_version == 8
    assert [(used.domain, used.version) for used in graph.opset_import] == [("", 11)]
    assert "Shape" not in {node.op_type for node in graph.graph.node}
    found = run(file, images)
    recipe = dataclasses.replace(RECIPE, nms="hard")
    with torch.no_grad():
        own = detect(model(images), torch.tensor([[320, 320]] * 2), recipe)
    for i in range(2):
        assert len(own[i].scores) > 20
        np.testing.assert_allclose(found["scores"][i], own[i].scores, atol=1e-3)
        # As sets: many scores of this network are 1.
        distances = (found["boxes"][i] * 320 - own[i].boxes.unsqueeze(1)).abs().amax(dim=2)
        same = (distances < 0.1) & (found["labels"][i] == own[i].labels.unsqueeze(1))
        assert same.any(dim=1).float().mean() > 0.9
