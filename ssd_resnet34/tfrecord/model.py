"""SSD300 on a truncated ResNet as TensorFlow pads it, with a class and a box head on each map.

TensorFlow's "same" padding of a convolution of stride 2 on an even size is uneven: it is after the
last row and column only. Attribute names are those of the COCO recipe, whose fused heads `mbox` are
two heads here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_resnet34.anchors import anchors_per_cell
from ssd_resnet34.backbone import BasicBlock, make_backbone
from ssd_resnet34.model import COORDINATES
from ssd_resnet34.tfrecord.config import Recipe

# Standard deviation of the standard normal distribution cut at -2 and 2.
TRUNCATED_STD = 0.87962566103423978


class SSD(nn.Module):
    """`model(images)`: (N, 3, 300, 300) to deltas (N, 4, P) and logits (N, 1 + classes, P).

    Logit channel 0 is background. Outputs are raw and have the autocast's dtype.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.num_channels = 1 + num_classes
        self.model, backbone_channels = make_backbone(recipe.backbone)
        # The max pool after the first ReLU has no padding, but its last window reaches over the
        # edge.
        self.model[2][1] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.additional_blocks = nn.ModuleList(
            [
                make_extra_block(backbone_channels, 256, UnevenConv2d(256, 512, 3, stride=2)),
                make_extra_block(512, 256, nn.Conv2d(256, 512, 3, stride=2, padding=1)),
                make_extra_block(512, 128, UnevenConv2d(128, 256, 3, stride=2)),
                make_extra_block(256, 128, nn.Conv2d(128, 256, 3)),
                make_extra_block(256, 128, nn.Conv2d(128, 256, 3)),
            ]
        )
        map_channels = (backbone_channels, 512, 512, 256, 256, 256)
        self.class_net = _make_heads(recipe, map_channels, self.num_channels)
        self.box_net = _make_heads(recipe, map_channels, COORDINATES)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights as the TensorFlow port does.

        In the backbone: TensorFlow's `variance_scaling` over the inputs of an output, a normal
        distribution cut at two standard deviations; the last batch normalisation of a block starts
        at 0, so that the block first passes its input on. Behind it: Xavier, and biases of 0.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                inputs = module.weight[0].numel()
                std = inputs**-0.5 / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
        for layers in (self.additional_blocks, self.class_net, self.box_net):
            for module in layers.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = self.model(images)
        feature_maps = [feature_map]
        for block in self.additional_blocks:
            feature_map = block(feature_map)
            feature_maps.append(feature_map)

        deltas = []
        logits = []
        heads = zip(feature_maps, self.class_net, self.box_net, strict=True)
        for feature_map, class_head, box_head in heads:
            deltas.append(rows_of_anchors(box_head(feature_map), COORDINATES))
            logits.append(rows_of_anchors(class_head(feature_map), self.num_channels))
        return torch.cat(deltas, dim=1).transpose(1, 2), torch.cat(logits, dim=1).transpose(1, 2)


class UnevenConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2 on an even size, padded by 1 at the end only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def make_extra_block(in_channels: int, middle_channels: int, last: nn.Conv2d) -> nn.Sequential:
    """Return a 1x1 convolution to `middle_channels`, then `last`, each with ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, middle_channels, 1),
        nn.ReLU(inplace=True),
        last,
        nn.ReLU(inplace=True),
    )


def _make_heads(
    recipe: Recipe, map_channels: tuple[int, ...], channels_per_anchor: int
) -> nn.ModuleList:
    """Return a 3x3 convolution for each feature map, with some channels for each anchor."""
    heads = nn.ModuleList()
    for in_channels, num_anchors in zip(map_channels, anchors_per_cell(recipe), strict=True):
        heads.append(nn.Conv2d(in_channels, num_anchors * channels_per_anchor, 3, padding=1))
    return heads


def rows_of_anchors(raw: Tensor, channels: int) -> Tensor:
    """Reshape (N, shapes * channels, H, W) to (N, H * W * shapes, channels)."""
    return raw.permute(0, 2, 3, 1).reshape(raw.shape[0], -1, channels)


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the network for `num_classes` foreground classes, with random weights."""
    return SSD(recipe, num_classes)
