from dataclasses import replace

import pytest

from common.errors import UserError
from fcos.config import RECIPES, Recipe


def test_recipes_differ_as_the_published_ones_do():
    def differences(name, base):
        own, other = vars(RECIPES[name]), vars(RECIPES[base])
        return {key: value for key, value in own.items() if value != other[key]}

    assert next(iter(RECIPES)) == "gn"
    assert differences("nogn", "gn") == {"head_norm": "none"}
    assert differences("gn_2x", "gn") == {"epochs": 24, "lr_decay_epochs": (16, 22)}
    assert differences("gn_mstrain_2x", "gn_2x") == {"img_scale": ("640,1333", "800,1333")}
    for name in ("gn", "gn_2x", "gn_mstrain_2x"):
        assert differences(f"r101_{name}", name) == {"backbone": "resnet101"}
    assert differences("center", "gn") == {"center_radius": 1.5}
    assert differences("tricks", "center") == {
        "conv_bias": True,
        "norm_on_bbox": True,
        "centerness_on_reg": True,
        "box_loss": "giou",
        "mean": (103.53, 116.28, 123.675),
        "warmup_kind": "linear",
        "clip_norm": 0.0,
        "nms_iou": 0.6,
    }


@pytest.mark.parametrize(("world", "batch", "lr"), [(8, 2, 0.01), (1, 2, 0.00125), (1, 16, 0.01)])
def test_rate_follows_the_global_batch(world, batch, lr):
    assert RECIPES["gn"].base_lr(world, batch) == pytest.approx(lr)
    assert RECIPES["gn"].lr_at(500, 100, world, batch) == pytest.approx(lr)


def test_no_warm_up():
    assert Recipe(warmup=0).lr_at(0, 100, 8, 2) == pytest.approx(0.01)


def test_scales_are_pairs_in_any_order():
    recipe = Recipe(img_scale=("1333,640", "800,1333"))
    assert recipe.scales == ((640, 1333), (800, 1333))
    assert recipe.eval_scale == (800, 1333)


@pytest.mark.parametrize("channels", [100, 48, 1])
def test_channels_fit_the_group_norm(channels):
    with pytest.raises(UserError, match=f"--channels {channels}: not a multiple of 32"):
        Recipe(channels=channels)
    assert Recipe(channels=channels, head_norm="none").channels == channels


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_norm", "bn"),
        ("box_loss", "l1"),
        ("shapes", "auto"),
        ("eval_shapes", "all"),
        ("warmup_kind", "exp"),
        ("img_scale", ("800",)),
        ("img_scale", ()),
        ("img_scale", ("800,1333", "0,800")),
    ],
)
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(UserError, match=f"--{field}"):
        replace(RECIPES["gn"], **{field: value})
