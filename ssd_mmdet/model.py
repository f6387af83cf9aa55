"""SSD on VGG16: six feature maps (seven for 512 pixels) with two 3x3 convolutions on each.

The names of the attributes are the keys of MMDetection's checkpoints before version 2.14, so a
state dict of this network is one of theirs and the other way round.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from ssd_mmdet.anchors import anchors_per_cell
from ssd_mmdet.config import Recipe

# Output channels of VGG16's 3x3 convolutions. "M" is a 2x2 max pool that keeps an odd last row and
# column.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
FIRST_LEVEL_CHANNELS = 512
FIRST_LEVEL_LAYER = 22  # index in `features` of the ReLU whose normalised output is level 0
FC7_CHANNELS = 1024  # VGG16's layers fc6 and fc7 as convolutions
INITIAL_LENGTH = 20.0  # of level 0's normalised vectors; SSD paper, section 3.1


class ExtraLevel(NamedTuple):
    """A 1x1 convolution, and another one whose output is the next feature map."""

    middle_channels: int
    channels: int
    kernel: int
    stride: int
    padding: int


EXTRA_LEVELS = {  # by the size of the network input
    300: (
        ExtraLevel(256, 512, kernel=3, stride=2, padding=1),
        ExtraLevel(128, 256, kernel=3, stride=2, padding=1),
        ExtraLevel(128, 256, kernel=3, stride=1, padding=0),
        ExtraLevel(128, 256, kernel=3, stride=1, padding=0),
    ),
    512: (
        ExtraLevel(256, 512, kernel=3, stride=2, padding=1),
        ExtraLevel(128, 256, kernel=3, stride=2, padding=1),
        ExtraLevel(128, 256, kernel=3, stride=2, padding=1),
        ExtraLevel(128, 256, kernel=3, stride=2, padding=1),
        ExtraLevel(128, 256, kernel=4, stride=1, padding=1),
    ),
}


class L2Norm(nn.Module):
    """Scale the channel vector of each cell to length 1, then each channel by its `weight`.

    Computed in fp32 whatever the input.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), INITIAL_LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        # The original adds 1e-10 to the length, which the ONNX exporter would take for adding 0.
        # A lower limit of 1e-10 has the same effect.
        squared_length = x_fp32.square().sum(dim=1, keepdim=True)
        length = squared_length.clamp(min=1e-20).sqrt()
        scaled = self.weight.view(1, -1, 1, 1) * x_fp32 / length
        return scaled.to(x.dtype)


class Backbone(nn.Module):
    """VGG16 with fc6 (dilated) and fc7 as convolutions, and the extra levels after it.

    Source: SSD paper, section 3 and figure 2.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(channels * recipe.width))

        layers = []
        in_channels = 3
        for entry in VGG16:
            if entry == "M":
                layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
                continue
            layers.append(nn.Conv2d(in_channels, scaled(entry), 3, padding=1))
            layers.append(nn.ReLU(inplace=True))
            in_channels = scaled(entry)
        fc7_channels = scaled(FC7_CHANNELS)
        layers.append(nn.MaxPool2d(3, stride=1, padding=1))
        layers.append(nn.Conv2d(in_channels, fc7_channels, 3, padding=6, dilation=6))
        layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(fc7_channels, fc7_channels, 1))
        layers.append(nn.ReLU(inplace=True))
        self.features = nn.Sequential(*layers)
        self.level_channels = [scaled(FIRST_LEVEL_CHANNELS), fc7_channels]

        self.extra = nn.ModuleList()
        for level in EXTRA_LEVELS[recipe.image_size]:
            in_channels = self.level_channels[-1]
            middle_channels = scaled(level.middle_channels)
            channels = scaled(level.channels)
            self.extra.append(nn.Conv2d(in_channels, middle_channels, 1))
            self.extra.append(
                nn.Conv2d(middle_channels, channels, level.kernel, level.stride, level.padding)
            )
            self.level_channels.append(channels)
        self.l2_norm = L2Norm(self.level_channels[0])
        self.initialise()

    def initialise(self) -> None:
        """Draw random weights as MMDetection does."""
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        for layer in self.extra:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps (N, C, H, W) of images (N, 3, S, S), the largest first."""
        levels = []
        x = images
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == FIRST_LEVEL_LAYER:
                levels.append(self.l2_norm(x))
        levels.append(x)
        for index, layer in enumerate(self.extra):
            x = layer(x).relu_()
            is_second_of_level = index % 2 == 1
            if is_second_of_level:
                levels.append(x)
        return levels


class Head(nn.Module):
    """The box and the class convolution of every feature map."""

    def __init__(self, recipe: Recipe, level_channels: list[int], class_channels: int):
        super().__init__()
        self.class_channels = class_channels
        self.reg_convs = _make_heads(recipe, level_channels, outputs=4)
        self.cls_convs = _make_heads(recipe, level_channels, outputs=class_channels)
        for layer in [*self.reg_convs, *self.cls_convs]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        deltas = []
        logits = []
        for level, convolution in zip(levels, self.reg_convs, strict=True):
            deltas.append(_rows_of_anchors(convolution(level), 4))
        for level, convolution in zip(levels, self.cls_convs, strict=True):
            logits.append(_rows_of_anchors(convolution(level), self.class_channels))
        return torch.cat(deltas, dim=1), torch.cat(logits, dim=1)


def _make_heads(recipe: Recipe, level_channels: list[int], outputs: int) -> nn.ModuleList:
    """Return a 3x3 convolution for each feature map that has `outputs` channels for each anchor."""
    heads = nn.ModuleList()
    for in_channels, shapes in zip(level_channels, anchors_per_cell(recipe), strict=True):
        heads.append(nn.Conv2d(in_channels, shapes * outputs, 3, padding=1))
    return heads


def _rows_of_anchors(output: Tensor, channels: int) -> Tensor:
    """Return a head's output (N, shapes * channels, H, W) as (N, H * W * shapes, channels).

    The rows are in the order of the anchors: row, column, shape.
    """
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, channels)


class SSD(nn.Module):
    """The network: `model(images)` of (N, 3, S, S) returns deltas and logits of P anchors.

    Deltas are (N, P, 4), logits (N, P, num_classes + 1) with the background last. Both are raw
    outputs in the data type of the autocast.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.backbone = Backbone(recipe)
        self.bbox_head = Head(recipe, self.backbone.level_channels, num_classes + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.bbox_head(self.backbone(images))


def backbone_stages(model: nn.Module) -> list[list[nn.Module]]:
    """Return the stages of the backbone, the first ones first, as `--freeze` counts them.

    Each ends with a max pool; the last one is fc6 and fc7. The extra levels are none of them.
    """
    stages = [[]]
    for layer in model.backbone.features:
        stages[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            stages.append([])
    return stages


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the network for `num_classes` foreground classes, with random weights.

    Raise UserError for an image size for which there is no SSD.
    """
    if recipe.image_size not in EXTRA_LEVELS:
        sizes = ", ".join(str(size) for size in EXTRA_LEVELS)
        raise UserError(f"image_size {recipe.image_size}: not one of {sizes}")
    return SSD(recipe, num_classes)
