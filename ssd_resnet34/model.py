"""SSD300: a truncated ResNet, five extra blocks, and a 3x3 convolution on each of six feature maps.

The attributes `model`, `additional_blocks` and `mbox` are named as the keys of published
checkpoints, so a state dict of this network is one of theirs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssd_resnet34.anchors import anchors_per_cell
from ssd_resnet34.backbone import STAGES, make_backbone
from ssd_resnet34.config import Recipe

COORDINATES = 4


class ExtraBlock(NamedTuple):
    """A 1x1 convolution to `middle_channels`, then a 3x3 one to `out_channels`."""

    middle_channels: int
    out_channels: int
    stride: int  # of the 3x3 convolution
    padding: int


EXTRA_BLOCKS = (
    ExtraBlock(256, 512, stride=2, padding=1),
    ExtraBlock(256, 512, stride=2, padding=1),
    ExtraBlock(128, 256, stride=2, padding=1),
    ExtraBlock(128, 256, stride=1, padding=0),
    ExtraBlock(128, 256, stride=1, padding=0),
)
STANDARD_WIDTH = 64  # the backbone's width that the channels above are for
LAST_OUT_CHANNELS = {"resnet18": 128}  # its last block is narrower, as in NVIDIA's SSD example


class SSD(nn.Module):
    """The network: `model(images)` takes (N, 3, 300, 300) to deltas and logits.

    Deltas are (N, 4, P), logits (N, 1 + num_classes, P), and channel 0 of the logits is background.
    Both are raw and have the dtype of autocast.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.num_channels = 1 + num_classes
        self.model, channels = make_backbone(recipe.backbone)
        map_channels = [channels]
        self.additional_blocks = nn.ModuleList()
        for block in extra_blocks(recipe.backbone):
            self.additional_blocks.append(make_extra_block(channels, block))
            channels = block.out_channels
            map_channels.append(channels)

        self.mbox = nn.ModuleList()
        for channels, num_shapes in zip(map_channels, anchors_per_cell(recipe), strict=True):
            out_channels = num_shapes * (self.num_channels + COORDINATES)
            self.mbox.append(nn.Conv2d(channels, out_channels, 3, padding=1))

        # Xavier over each head as a whole, as in the port. Biases keep PyTorch's default.
        for module in [*self.additional_blocks.modules(), *self.mbox]:
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = self.model(images)
        feature_maps = [feature_map]
        for block in self.additional_blocks:
            feature_map = block(feature_map)
            feature_maps.append(feature_map)

        # The channels of a head are those of the logits, ordered by class and shape, then those of
        # the deltas, by coordinate and shape. So the anchors of a feature map come in the order of
        # shape, row, column.
        raw = []
        for feature_map, head in zip(feature_maps, self.mbox, strict=True):
            channels = self.num_channels + COORDINATES
            raw.append(head(feature_map).reshape(images.shape[0], channels, -1))
        logits, deltas = torch.cat(raw, dim=2).split([self.num_channels, COORDINATES], dim=1)
        return deltas, logits


def extra_blocks(backbone: str) -> list[ExtraBlock]:
    """Return the extra blocks behind a backbone, which are narrower if the backbone is."""
    blocks = list(EXTRA_BLOCKS)
    last_out_channels = LAST_OUT_CHANNELS.get(backbone, blocks[-1].out_channels)
    blocks[-1] = blocks[-1]._replace(out_channels=last_out_channels)
    width = STAGES[backbone].width
    scaled = []
    for block in blocks:
        middle_channels = block.middle_channels * width // STANDARD_WIDTH
        out_channels = block.out_channels * width // STANDARD_WIDTH
        scaled.append(block._replace(middle_channels=middle_channels, out_channels=out_channels))
    return scaled


def make_extra_block(in_channels: int, block: ExtraBlock) -> nn.Sequential:
    """Return the layers of an extra block behind a map of `in_channels`."""
    return nn.Sequential(
        nn.Conv2d(in_channels, block.middle_channels, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(block.middle_channels, block.out_channels, 3, block.stride, block.padding),
        nn.ReLU(inplace=True),
    )


def backbone_stages(model: nn.Module) -> list[list[nn.Module]]:
    """Return the stages of the backbone, the first ones first, as `--freeze` counts them.

    The stem belongs to the first one.
    """
    *stem, first, second, third = model.model
    return [[*stem, first], [second], [third]]


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the network for `num_classes` foreground classes, with random weights."""
    return SSD(recipe, num_classes)
