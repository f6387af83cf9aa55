"""Small networks of all models, and checkpoints of them."""

import importlib
from dataclasses import asdict, replace

TFRECORD = "ssd_resnet34/tfrecord"
MODELS = ("ssd_mmdet", "ssd_resnet34", "m2det", "fcos")
ALL = (*MODELS, TFRECORD)
# A preset, what is changed in it for a small network, and a tensor that only this model has.
SMALL = {
    "ssd_mmdet": ("ssd512", {"width": 1 / 16}, "bbox_head.cls_convs.0.weight"),
    "ssd_resnet34": ("quickstart", {}, "mbox.0.weight"),
    "m2det": ("quickstart", {"planes": 16}, "unet1.layers.0.conv.weight"),
    "fcos": ("quickstart", {"channels": 32, "tower_convs": 1}, "bbox_head.conv_centerness.weight"),
    TFRECORD: ("small", {}, "class_net.0.weight"),
}


def module(model, name):
    return importlib.import_module(f"{model.replace('/', '.')}.{name}")


def small_recipe(model):
    preset, changes, _ = SMALL[model]
    return replace(module(model, "config").RECIPES[preset], **changes)


def run_state(model, weights, **changes):
    """What `RunState` writes beside the weights."""
    recipe = small_recipe(model)
    return {
        "model": weights,
        "written_by": recipe.model,
        "recipe": asdict(recipe),
        "classes": ["person", "cat", "dog"],
        "category_ids": [1, 17, 18],
        "run": {"seed": 0},
        "iteration": 1,
        **changes,
    }
