"""Which boxes each model's anchors or points see, and compare.py, which asks all of them."""

import importlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import compare
from common.coco.coverage import Presets, different_presets
from fcos import coverage as fcos_coverage
from fcos.anchors import make_axes, map_sizes
from fcos.config import RECIPES as FCOS_RECIPES
from fcos.targets import assign, has_point
from tests.scripts import ROOT

TINY = ROOT / "tests/data/tiny_coco"
WITH_ANCHORS = ("ssd_resnet34", "ssd_resnet34.tfrecord", "ssd_mmdet", "m2det")


def module(model, name):
    return importlib.import_module(f"{model}.{name}")


def first_recipe(model):
    return next(iter(module(model, "config").RECIPES.values()))


@pytest.mark.parametrize("model", WITH_ANCHORS)
def test_a_box_equal_to_an_anchor_is_seen_and_a_tiny_one_is_not(model):
    recipe = first_recipe(model)
    matching = module(model, "coverage").MATCHING
    side = 0.15 * recipe.image_size  # of the smallest anchors of the second map, nearly
    cell = recipe.image_size / recipe.anchor_maps[1]
    center = 5.5 * cell
    equal = [center - side / 2, center - side / 2, center + side / 2, center + side / 2]
    tiny = [center, center, center + 3, center + 3]
    thin = [center - 100, center, center + 100, center + 10]
    boxes = np.array([equal, tiny, thin])
    assert matching.seen_boxes(boxes, recipe).tolist() == [True, False, False]


@pytest.mark.parametrize("model", WITH_ANCHORS)
def test_boxes_are_resized_as_evaluation_resizes_the_image(model):
    """To a square, whatever the shape of the image."""
    recipe = first_recipe(model)
    matching = module(model, "coverage").MATCHING
    boxes = matching.boxes_in_input(
        np.array([[0.0, 100, 300, 200]]), np.array([[200, 600]]), recipe
    )
    size = recipe.image_size
    assert boxes.tolist() == [[0, size / 2, size / 2, size]]


def test_boxes_of_fcos_keep_their_shape():
    recipe = replace(FCOS_RECIPES["gn"], img_scale=("100,200",))
    boxes = fcos_coverage.boxes_in_input(
        np.array([[0.0, 100, 300, 200], [0, 0, 10, 20]]), np.array([[200, 600], [50, 50]]), recipe
    )
    # 200 x 600 becomes 67 x 200, its height rounded; 50 x 50 becomes 100 x 100.
    np.testing.assert_allclose(boxes, [[0, 33.5, 100, 67], [0, 0, 20, 40]])


@pytest.mark.parametrize("preset", ["gn", "center"])
def test_a_box_of_fcos_is_seen_where_it_would_be_learned_alone(preset):
    recipe = FCOS_RECIPES[preset]
    random = np.random.default_rng(0)
    corner = random.uniform(0, 200, (300, 1, 2))
    size = np.exp(random.uniform(0, 5, (300, 1, 2)))
    boxes = torch.tensor(np.concatenate([corner, corner + size], axis=2), dtype=torch.float32)
    axes = make_axes(recipe, map_sizes(recipe, 352, 352))
    labels = torch.zeros(300, 1, dtype=torch.int64)
    valid = torch.ones(300, 1, dtype=torch.bool)
    positive, _, _ = assign(axes, boxes, labels, valid, recipe.center_radius)
    found = has_point(axes, boxes, recipe.center_radius)
    assert found[:, 0].tolist() == positive.any(dim=1).tolist()
    assert 0 < found.sum() < 300


def test_the_ends_of_fcos_ranges():
    """A box at a distance of 64 is learned from both levels, and one between points from none."""
    recipe = replace(FCOS_RECIPES["gn"], ranges=(-1, 16, 32, 64, 128, 256))

    def is_seen(*box):
        return fcos_coverage.seen_boxes(np.array([box], np.float64), recipe).item()

    assert is_seen(0, 0, 8, 8)  # the point (4, 4)
    assert not is_seen(5, 5, 11, 11)  # between the points 4 and 12
    assert not is_seen(4, 4, 12, 12)  # points on its sides
    # Its only points of the first level have a side at 20 pixels, those of the second at 24.
    assert is_seen(0, 0, 24, 24)
    assert not is_seen(0, 0, 800, 800)  # beyond the last level, from every point


def test_presets_of_a_model_that_see_other_boxes():
    """A preset whose anchors are those of another one is not shown."""
    names = {}
    for model in ("ssd_resnet34", "ssd_mmdet", "m2det", "fcos"):
        recipes = module(model, "config").RECIPES
        first = next(iter(recipes))
        matching = module(model, "coverage").MATCHING
        presets = Presets(first, recipes[first], recipes, matching)
        names[model] = list(different_presets(presets))
    assert names == {
        "ssd_resnet34": ["1p"],
        "ssd_mmdet": ["1p", "ssd512"],
        "m2det": ["512_vgg", "320_vgg", "704_vgg", "800_vgg"],
        "fcos": ["gn", "center", "quickstart"],
    }


def test_compare_shows_which_detector_sees_the_data(capsys):
    compare.main([f"--data={TINY}"])
    lines = capsys.readouterr().out.splitlines()
    shares = {}
    for line in lines:
        found = re.fullmatch(r"(\S+ --recipe \S+) \(.+\) .* (\d+)%", line)
        if found:
            shares[found[1]] = int(found[2])
    assert len(shares) == 11
    # COCO's objects: SSD300 sees six of ten, larger inputs see more, points see nearly all.
    assert shares["ssd_mmdet --recipe 1p"] == shares["ssd_resnet34 --recipe 1p"] == 58
    assert shares["ssd_mmdet --recipe ssd512"] == 67
    assert shares["fcos --recipe gn"] == 99
    assert lines[-1].startswith(
        "fits best: of the detectors with anchors m2det --recipe 704_vgg (704 x 704), which sees "
    )
    assert "; of the detectors with points fcos --recipe gn (800,1333), which sees 99%" in lines[-1]


def test_compare_without_data_says_how(capsys):
    with pytest.raises(SystemExit):
        compare.main([])
    assert "nothing to compare: give a data set with --data=DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model", ["ssd_mmdet", *(pytest.param(m, marks=pytest.mark.again) for m in ("fcos", "m2det"))]
)
def test_check_data_says_what_the_preset_sees(model, tmp_path, capsys):
    command = [f"--data={TINY}", f"--output_dir={tmp_path}/run", "--check_data"]
    assert not module(model, "train").main(command)
    *lines, picture, advice = capsys.readouterr().out.splitlines()
    assert "  images: 50, of which 1 are without a box" in lines
    assert picture == f"  picture: {tmp_path}/run_check_data.png"
    assert (tmp_path / "run_check_data.png").stat().st_size > 10_000
    assert advice.startswith("advice: ")
    if model == "ssd_mmdet":  # the example of the documents
        assert (
            "  seen                                    0%    9%    67%    85%    85%  93%  58%"
            in (lines)
        )
        assert advice.startswith("advice: take --recipe ssd512, whose input of 512 x 512 sees 67%")
