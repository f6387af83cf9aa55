"""Flags of the Ascend port of MMDetection's FCOS, beside those of all models."""

from common.parser import answered, needless

OLD_FLAGS = (
    *answered("--bin", "the port's choice of compiled operators; omit it"),
    *answered("--conda-name", "PYTHON=... names the interpreter of a launch script"),
    # Export
    *needless("--dataset", value="coco"),
    *answered("--dataset", "the checkpoint names its classes; omit it"),
    *answered("--view", "no window opens; omit it"),
    *answered(
        "--mean --std", "the recipe has them, and the metadata of the exported file says them"
    ),
)
