"""The demo script on real photos, with a checkpoint as the port's users name it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.coco.images import read_image
from common.npu import checkpoint
from fcos import demo
from fcos.config import Recipe
from fcos.data import prepare_image
from fcos.model import build_model
from fcos.postprocess import detect

PHOTOS = sorted(Path(__file__).parents[1].glob("data/tiny_coco/val2017/*.jpg"))[:2]
RECIPE = Recipe(backbone="resnet14", channels=64, tower_convs=1, img_scale=("96,160",))
NAMES = ("cat", "dog", "émeu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model(RECIPE, len(NAMES)).eval()
    torch.nn.init.normal_(model.bbox_head.conv_cls.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "mine.pth"
    kept = {"model": model.state_dict(), "classes": list(NAMES)}
    checkpoint.save(path, {**kept, "recipe": dataclasses.asdict(RECIPE)})
    return path


def test_draws_what_detect_finds_and_goes_on_after_a_broken_file(weights, model, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(PHOTOS[0].read_bytes()[:2000])
    show = ["--show_dir", str(tmp_path / "out"), "--device=cpu", "--img_scale=96,160"]
    found = [*map(str, PHOTOS), str(broken)]
    ports = ["--config=fcos_r50_caffe_fpn_4x4_1x_coco.py", "--show"]
    status = demo.main([str(weights), *found, *show, *ports, "--min_score=0.06"])
    assert status == 1
    said = capsys.readouterr().out
    assert "2 of 3 images" in said
    assert "--config has no effect" in said
    assert "--show has no effect" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert len(results) == 2
    for photo in PHOTOS:
        image = read_image(str(photo))
        recipe = dataclasses.replace(RECIPE, eval_shapes="exact")  # on a CPU
        with torch.no_grad():
            outputs = model(prepare_image(image, recipe).unsqueeze(0))
        (expected,) = detect(outputs, torch.tensor([image.shape[:2]]), RECIPE)
        (drawn,) = [value for name, value in results.items() if name.endswith(photo.name)]
        keep = expected.scores >= 0.06
        assert keep.any()
        np.testing.assert_allclose(drawn["scores"], expected.scores[keep], atol=1e-4)
        np.testing.assert_allclose(drawn["boxes"], expected.boxes[keep], atol=0.02)
        assert drawn["classes"] == [NAMES[label] for label in expected.labels[keep]]
        (picture,) = (tmp_path / "out").rglob(photo.name)
        assert Image.open(picture).size == image.shape[1::-1]
