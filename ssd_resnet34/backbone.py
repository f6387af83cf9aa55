"""The backbone: a ResNet up to its third stage, with a feature map of stride 8.

As in MLPerf's SSD, the third stage does not downsample. The blocks are those of "Deep Residual
Learning for Image Recognition", with the stride in the 3x3 convolution, as in torchvision.
"""

from typing import NamedTuple

from torch import Tensor, nn

from common.errors import UserError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1  # output channels / width

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1 beside a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + shortcut)


class Stages(NamedTuple):
    """The three stages of a ResNet, in which the ResNets differ."""

    block: type[nn.Module]
    depths: tuple[int, int, int]  # blocks of each stage
    width: int  # of the first stage; it doubles with each stage


# There are published weights for all but resnet10, which is of half width.
STAGES = {
    "resnet10": Stages(BasicBlock, (1, 1, 1), 32),
    "resnet18": Stages(BasicBlock, (2, 2, 2), 64),
    "resnet34": Stages(BasicBlock, (3, 4, 6), 64),
    "resnet50": Stages(Bottleneck, (3, 4, 6), 64),
}
STRIDES = (1, 2, 1)  # of the three stages


def make_backbone(name: str) -> tuple[nn.Sequential, int]:
    """Return the backbone and the number C of its output channels.

    It takes images (N, 3, 300, 300) to a feature map (N, C, 38, 38). The positions of its modules
    are the keys of published checkpoints: 0 conv1, 1 bn1, 2 pool, 3 to 5 the stages. Raise
    UserError for an unknown name.
    """
    if name not in STAGES:
        raise UserError(f"--backbone {name}: is not one of {', '.join(STAGES)}")
    stages = STAGES[name]
    backbone = nn.Sequential(
        nn.Conv2d(3, stages.width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(stages.width),
        nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)),
    )
    channels = stages.width
    width = stages.width
    for depth, stride in zip(stages.depths, STRIDES, strict=True):
        stage = nn.Sequential()
        for index in range(depth):
            stage.append(stages.block(channels, width, stride if index == 0 else 1))
            channels = width * stages.block.expansion
        backbone.append(stage)
        width *= 2
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):  # He initialisation, as torchvision's
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone, channels


def make_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """Return the projection of a shortcut, or None where the shape stays the same."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )
