"""The detector, as a user's program calls it and as the programs make it."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from common.npu import checkpoint
from common.npu.distributed import Ranks
from fcos import evaluate
from fcos.config import RECIPES
from fcos.detector import Detector
from fcos.model import build_model
from tests.scripts import TINY

SMALL = {"backbone": "resnet14", "channels": 64, "tower_convs": 1, "img_scale": ("64,107",)}
FLAGS = ("--backbone=resnet14", "--channels=64", "--tower_convs=1", "--img_scale=64,107")


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    recipe = replace(RECIPES["gn"], **SMALL)
    weights = build_model(recipe, 3).state_dict()
    state = {"model": weights, "recipe": asdict(recipe), "classes": ["cat", "dog", "cow"]}
    return Detector.from_checkpoint(state, recipe, torch.device("cpu"))


def test_no_image_has_no_detections(detector):
    assert detector([]) == []


def test_images_go_through_the_network_one_by_one(detector):
    batches = []
    handle = detector.model.register_forward_pre_hook(
        lambda module, args: batches.append(len(args[0]))
    )
    images = [np.zeros((height, 60, 3), np.uint8) for height in (40, 50, 90)]
    detections = detector(images)
    handle.remove()
    assert batches == [1, 1, 1]
    assert len(detections) == 3


@pytest.mark.parametrize(("flags", "nms_iou"), [([], 0.6), (["--nms_iou=0.5"], 0.5)])
def test_a_published_detectors_nms_iou_yields_to_the_flag(tmp_path, monkeypatch, flags, nms_iou):
    model = build_model(replace(RECIPES["tricks"], **SMALL), 80)
    path = tmp_path / "epoch_24.pth"
    checkpoint.save(path, {"state_dict": model.state_dict()})
    recipes = []
    monkeypatch.setattr(evaluate, "detect_all", lambda model, recipe, *args: recipes.append(recipe))
    where = [f"--data={TINY}", f"--checkpoint={path}", "--device=cpu", f"--output_dir={tmp_path}"]
    evaluate.main([*where, *FLAGS, *flags])
    (recipe,) = recipes
    assert (recipe.head_norm, recipe.norm_on_bbox) == ("gn", True)
    assert recipe.nms_iou == nms_iou


@pytest.fixture
def trained_file(tmp_path):
    """A checkpoint of a run at a scale of its own, on the canvas "square" and with NMS at 0.6."""
    torch.manual_seed(0)
    recipe = replace(RECIPES["gn"], **SMALL, eval_shapes="square", nms_iou=0.6)
    path = tmp_path / "iter_1.pt"
    weights = build_model(recipe, 80).state_dict()
    checkpoint.save(path, {"model": weights, "recipe": asdict(recipe)})
    return path


@pytest.mark.parametrize(
    ("flags", "expected", "line"),
    [
        (
            [],
            (("64,107",), "square", 0.6),
            "at most 64 and 107 pixels (--img_scale), canvas square",
        ),
        (
            ["--img_scale=96,160", "--eval_shapes=exact", "--nms_iou=0.5"],
            (("96,160",), "exact", 0.5),
            "at most 96 and 160 pixels (--img_scale), canvas exact",
        ),
    ],
)
def test_a_checkpoint_is_evaluated_as_its_run_did_unless_a_flag_says_another(
    trained_file, tmp_path, monkeypatch, capsys, flags, expected, line
):
    recipes = []
    monkeypatch.setattr(evaluate, "detect_all", lambda model, recipe, *args: recipes.append(recipe))
    where = [f"--data={TINY}", f"--output_dir={tmp_path}", f"--checkpoint={trained_file}"]
    evaluate.main([*where, "--device=cpu", *flags])
    (recipe,) = recipes
    assert (recipe.img_scale, recipe.eval_shapes, recipe.nms_iou) == expected
    assert line in capsys.readouterr().out


def test_a_users_program_gets_the_scale_of_the_run(trained_file):
    recipe = Detector.load(trained_file, "cpu").recipe
    assert (recipe.eval_scale, recipe.eval_shapes) == ((64, 107), "square")


@pytest.mark.parametrize(("shapes", "timed"), [("exact", False), ("two", True)])
def test_kernels_are_not_timed_for_each_of_many_shapes(
    detector, tiny_val, monkeypatch, shapes, timed
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(detector, "recipe", replace(detector.recipe, eval_shapes=shapes))
    seen = []
    handle = detector.model.register_forward_pre_hook(
        lambda module, args: seen.append(torch.backends.cudnn.benchmark)
    )
    detector(np.zeros((40, 60, 3), np.uint8))
    assert torch.backends.cudnn.benchmark
    records = tiny_val.subset(np.arange(2))
    evaluate.detect_all(detector.model, detector.recipe, records, detector.device, Ranks(), 0)
    assert torch.backends.cudnn.benchmark
    handle.remove()
    assert set(seen) == {timed}
