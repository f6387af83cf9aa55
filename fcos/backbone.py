"""ResNet in caffe's form: the stride of a bottleneck is in its first 1x1 convolution.

Source: residual learning paper, section 4. Attribute names are the keys of the published files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

# Bottlenecks in each of the four stages. There are no published weights of resnet14.
STAGES = {
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet14": (1, 1, 1, 1),
}


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """Return the batch norm of a convolution.

    With fixed statistics both together are one convolution with other weights, which saves a pass
    over the feature map, forward and backward.
    """
    if bn.training:
        return bn(conv(x))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    bias = bn.bias - bn.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut; residual learning paper, figure 5."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, project: bool):
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if project:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            shortcut = conv_bn(x, self.downsample[0], self.downsample[1])
        x = F.relu(conv_bn(x, self.conv1, self.bn1), inplace=True)
        x = F.relu(conv_bn(x, self.conv2, self.bn2), inplace=True)
        x = conv_bn(x, self.conv3, self.bn3)
        x += shortcut
        return F.relu(x, inplace=True)


class ResNet(nn.Module):
    """Images (N, 3, H, W) to the feature maps C2 to C5, at strides 4, 8, 16 and 32.

    `depths` are the numbers of bottlenecks in the four stages. A new network has random weights,
    all of which are trained, and residual branches that start at zero (bn3). For pretrained
    weights, `freeze` comes next.
    """

    def __init__(self, depths: tuple[int, int, int, int]):
        super().__init__()
        self.frozen = False
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = make_stage(64, 64, depths[0], stride=1)
        self.layer2 = make_stage(256, 128, depths[1], stride=2)
        self.layer3 = make_stage(512, 256, depths[2], stride=2)
        self.layer4 = make_stage(1024, 512, depths[3], stride=2)
        self.channels = (256, 512, 1024, 2048)  # of C2 to C5
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def freeze(self) -> None:
        """Keep pretrained weights as they are in the stem, in C2 and in every batch norm.

        The batch norms also keep their statistics, in training mode too.
        """
        self.frozen = True
        for module in (self.conv1, self.bn1, self.layer1):
            module.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResNet":
        super().train(mode)
        if self.frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.relu(conv_bn(images, self.conv1, self.bn1), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)
        return [c2, c3, c4, c5]


def make_stage(in_channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    """Return `depth` bottlenecks; the first one has the stride and projects its shortcut."""
    blocks = [Bottleneck(in_channels, width, stride, project=True)]
    out_channels = Bottleneck.expansion * width
    for _ in range(depth - 1):
        blocks.append(Bottleneck(out_channels, width, stride=1, project=False))
    return nn.Sequential(*blocks)


def make_backbone(name: str) -> ResNet:
    """Return the backbone of that name, with random weights.

    Raise UserError for an unknown name.
    """
    if name not in STAGES:
        raise UserError(f"--backbone {name}: is not one of {', '.join(STAGES)}")
    return ResNet(STAGES[name])
