"""What a checkpoint is: by what it says of itself, and by the names of its tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from common.errors import UserError


class Kind(NamedTuple):
    """A kind of detector or backbone, which the name of one of its tensors gives away."""

    model: str  # the model of this repository that reads it, if any
    pattern: re.Pattern  # of the beginning of that name
    description: str


# The first kind that fits counts.
KINDS = (
    Kind("m2det", re.compile(r"unet1\."), "an M2Det detector"),
    Kind("ssd_resnet34", re.compile(r"mbox\."), "an SSD-ResNet34 detector"),
    Kind(
        "ssd_resnet34/tfrecord",
        re.compile(r"class_net\.\d+\."),
        "an SSD-ResNet34 detector of the TFRecord recipe",
    ),
    Kind("fcos", re.compile(r"bbox_head\.(conv|fcos)_centerness\."), "an FCOS detector"),
    Kind(
        "ssd_mmdet",
        re.compile(r"bbox_head\.cls_convs\.\d+\.(0\.)?(weight|bias)$"),
        "an SSD detector in MMDetection's layout",
    ),
    Kind("", re.compile(r"bbox_head\.retina_cls\."), "MMDetection's RetinaNet"),
    Kind("", re.compile(r"(rpn_head|roi_head)\."), "a two-stage detector of MMDetection"),
    Kind("", re.compile(r"bbox_head\."), "another detector of MMDetection"),
    Kind("", re.compile(r"backbone\.bottom_up\."), "a detector of Detectron2"),
    Kind("", re.compile(r"head\.classification_head\.module_list\."), "torchvision's SSD"),
    Kind("", re.compile(r"head\.classification_head\."), "a one-stage detector of torchvision"),
    Kind("", re.compile(r"(rpn|roi_heads)\."), "a two-stage detector of torchvision"),
    Kind("", re.compile(r"transformer\."), "a DETR detector"),
    Kind("", re.compile(r"features\.1\.running_mean"), "a VGG with batch normalisation"),
    Kind("", re.compile(r"(features\.)?31\.weight"), "a VGG16 with fc6 and fc7 as convolutions"),
    Kind("", re.compile(r"classifier\.0\.weight"), "torchvision's VGG"),
    Kind("", re.compile(r"features\.0\.weight"), "a VGG without fc6 and fc7 as convolutions"),
)
# ResNets by whether their blocks have a third convolution, and by the blocks of each stage.
RESNETS = {
    (False, (2, 2, 2, 2)): "ResNet-18",
    (False, (3, 4, 6, 3)): "ResNet-34",
    (True, (3, 4, 6, 3)): "ResNet-50",
    (True, (3, 4, 23, 3)): "ResNet-101",
    (True, (3, 8, 36, 3)): "ResNet-152",
}
DEFORMABLE = re.compile(r"\.conv_offset\.")  # as mmcv names what they learn
BLOCK = re.compile(
    r"(?:backbone\.|base\.|backbone\.body\.)?layer([1-4])\.(\d+)\.conv([13])\.weight"
)


def describe(names: Iterable[str]) -> str:
    """Return what a file is, by the names of its tensors; empty where that cannot be seen."""
    names = list(names)
    kind = _kind(names)
    parts = []
    if kind is not None:
        parts.append(kind.description)
    resnet = _resnet(names)
    if resnet:
        parts.append(f"a {resnet}")
    if any(DEFORMABLE.search(name) for name in names):
        parts.append("deformable convolutions")
    return " with ".join(parts)


def _kind(names: list[str]) -> Kind | None:
    for kind in KINDS:
        if any(kind.pattern.match(name) for name in names):
            return kind
    return None


def _resnet(names: list[str]) -> str:
    """Return which ResNet is among some tensors, empty where there is none that is known."""
    blocks = [0, 0, 0, 0]
    is_bottleneck = False
    for name in names:
        match = BLOCK.fullmatch(name)
        if match is None:
            continue
        stage, block, convolution = match.groups()
        if convolution == "3":
            is_bottleneck = True
        else:
            blocks[int(stage) - 1] = max(blocks[int(stage) - 1], int(block) + 1)
    return RESNETS.get((is_bottleneck, tuple(blocks)), "")


def model_of(state: Mapping, names: Iterable[str]) -> str:
    """Return the model whose detector a checkpoint holds, empty where it is of none.

    Ours say it (`written_by`). In those of earlier versions and of other projects the names of the
    tensors show it.
    """
    written_by = state.get("written_by")
    if isinstance(written_by, str):
        return written_by
    kind = _kind(list(names))
    return "" if kind is None else kind.model


def require_model(state: Mapping, names: Iterable[str], model: str, file: str) -> None:
    """Raise UserError, naming the file, where it is a detector of another model than `model`."""
    actual = model_of(state, names)
    if actual not in ("", model):
        raise UserError(
            f"{file}: a detector of {actual}, not of {model}",
            f"give one of {model}, or use the programs of {actual}",
        )
