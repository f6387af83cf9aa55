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
from common.errors import UserError
from common.npu import checkpoint
from fcos import pthtar2onx
from fcos.anchors import map_sizes
from fcos.config import RECIPES
from fcos.model import build_model
from fcos.postprocess import decode_outputs, detect_resized

PHOTOS = sorted(Path(__file__).parents[1].glob("data/tiny_coco/val2017/*.jpg"))[:2]
SMALL = {"backbone": "resnet14", "channels": 64, "tower_convs": 1}
NAMES = ["cat", "dog"]


def saved(folder, name, certain=False):
    torch.manual_seed(0)
    recipe = dataclasses.replace(RECIPES[name], **SMALL)
    model = build_model(recipe, len(NAMES)).eval()
    if certain:  # else no class passes the threshold
        torch.nn.init.zeros_(model.bbox_head.conv_cls.bias)
    kept = {"model": model.state_dict(), "classes": NAMES, "recipe": dataclasses.asdict(recipe)}
    checkpoint.save(folder / "iter_3.pt", kept)
    return recipe, model, folder / "iter_3.pt"


def onnx_outputs(file, images):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"input": images.numpy()})
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


def inputs(shape, recipe):
    images = [read_image(str(photo)) for photo in PHOTOS]
    return torch.stack([pthtar2onx.fit(image, shape, recipe) for image in images])


def test_raw_outputs_at_a_fixed_size(tmp_path, capsys):
    recipe, model, weights = saved(tmp_path, "gn")
    file = tmp_path / "new" / "raw.onnx"
    where = [str(weights), f"--output_file={file}", "--shape", "128", "160"]
    # The port's command has its configuration first.
    pthtar2onx.main(["fcos_r50.py", *where, "--verify", "--input-img", *map(str, PHOTOS)])
    assert "(2, 3, 128, 160): logits differ by" in capsys.readouterr().out
    images = inputs((128, 160), recipe)
    found = onnx_outputs(file, images)
    assert list(found) == ["logits", "distances", "centerness"]
    with torch.no_grad():
        expected = model(images).flat()
    for ours, theirs in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    graph = onnx.load(file)
    notes = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(notes["classes"]) == NAMES
    assert json.loads(notes["input_size"]) == [128, 160]
    assert json.loads(notes["mean"]) == list(recipe.mean)


@pytest.mark.parametrize(
    ("name", "dynamic"), [("gn", False), pytest.param("tricks", True, marks=pytest.mark.again)]
)
def test_decoded_outputs_at_a_fixed_and_at_any_size(tmp_path, name, dynamic):
    recipe, model, weights = saved(tmp_path, name)
    file = tmp_path / "decoded.onnx"
    where = [str(weights), f"--output_file={file}", "--shape", "128", "160", f"--recipe={name}"]
    pthtar2onx.main([*where, "--decoded", "--dynamic" if dynamic else "--no-dynamic"])
    for shape in ([128, 160], [192, 128])[: 1 + dynamic]:
        images = inputs(shape, recipe)
        found = onnx_outputs(file, images)
        points = sum(rows * columns for rows, columns in map_sizes(recipe, *shape))
        assert found["boxes"].shape == (2, points, 4)
        assert found["scores"].shape == (2, points, len(NAMES))
        with torch.no_grad():
            boxes, logits, centerness = decode_outputs(model(images), recipe)
        torch.testing.assert_close(found["boxes"], boxes, rtol=1e-4, atol=1e-3)
        scores = logits.sigmoid() * centerness.sigmoid()
        torch.testing.assert_close(found["scores"], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [pytest.param(11, marks=pytest.mark.again), 17])
def test_detections_of_a_fixed_batch(tmp_path, opset, capsys):
    recipe, model, weights = saved(tmp_path, "gn", certain=True)
    file = tmp_path / "detections.onnx"
    flags = ["--outputs=detections", "--batch=2", f"--opset={opset}", "--shape", "128", "160"]
    pthtar2onx.main([str(weights), f"--output_file={file}", *flags])
    said = capsys.readouterr().out
    assert "with NMS, batch 2: 100 detections, 0 other than the 100 of torch; 100" in said
    assert '--input_shape="input:2,3,128,160"' in said
    graph = onnx.load(file)
    assert graph.ir_version == 8
    assert [(used.domain, used.version) for used in graph.opset_import] == [("", opset)]
    assert "Shape" not in {node.op_type for node in graph.graph.node}
    images = inputs((128, 160), recipe)
    found = onnx_outputs(file, images)
    size = torch.tensor([[128, 160]] * 2)
    with torch.no_grad():
        own = detect_resized(model(images), size, torch.ones(2, 2), recipe)
    for i in range(2):
        torch.testing.assert_close(found["scores"][i], own[i].scores, rtol=0, atol=1e-5)
        distances = (found["boxes"][i] - own[i].boxes.unsqueeze(1)).abs().amax(dim=2)
        same = (distances < 0.01) & (found["labels"][i] == own[i].labels.unsqueeze(1))
        assert same.any(dim=1).float().mean() > 0.9


def test_a_free_size_has_no_nms_and_no_old_operator_set(tmp_path):
    _, _, weights = saved(tmp_path, "gn")
    with pytest.raises(UserError, match=r"--dynamic: the NMS needs a fixed size"):
        pthtar2onx.main([str(weights), "--dynamic", "--outputs=detections"])
    with pytest.raises(UserError, match=r"--opset 14: height and width are free from 15 on"):
        pthtar2onx.main([str(weights), "--dynamic", "--opset=14"])


def test_an_image_is_fitted_with_its_aspect_kept(recipe):
    image = np.full((30, 40, 3), 255, np.uint8)
    found = pthtar2onx.fit(image, (64, 96), recipe)
    assert found.shape == (3, 64, 96)
    inside = found.ne(0).all(dim=0)
    assert inside[:64, :85].all()
    assert not inside[:, 85:].any()


def test_a_shape_that_does_not_fit_the_strides_is_refused():
    with pytest.raises(UserError, match="--shape 800 1333"):
        pthtar2onx.parse(["--shape", "800", "1333"])
    with pytest.raises(UserError, match=r"^a\.pth b\.pth: give one checkpoint"):
        pthtar2onx.parse(["a.pth", "b.pth"])
