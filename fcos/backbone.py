"""ResNet in caffe's form: the stride of a bottleneck is in its first 1x1 convolution.

Source: residual learning paper, section 4. Attribute names are the keys of the published files.
"""

from typing import NamedTuple

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


class Affine(NamedTuple):
    """What a batch norm with fixed statistics does to each of its C channels."""

    scale: Tensor  # (C,)
    shift: Tensor  # (C,)


Affines = dict[nn.BatchNorm2d, Affine]


def affines_of(norms: list[nn.BatchNorm2d], dtype: torch.dtype) -> Affines:
    """Return what batch norms with fixed statistics do, in that dtype.

    It is computed for all of them at once: one after the other they are 265 kernels in a ResNet-50.
    It is computed in each step, so that weights may be loaded at any time.
    """
    weight = torch.cat([norm.weight for norm in norms])
    bias = torch.cat([norm.bias for norm in norms])
    mean = torch.cat([norm.running_mean for norm in norms])
    variance = torch.cat([norm.running_var for norm in norms])
    scale = weight * torch.rsqrt(variance + norms[0].eps)
    shift = bias - mean * scale
    channels = [norm.num_features for norm in norms]
    scales = scale.to(dtype).split(channels)
    shifts = shift.to(dtype).split(channels)
    affines = {}
    for i, norm in enumerate(norms):
        affines[norm] = Affine(scales[i], shifts[i])
    return affines


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, affines: Affines) -> Tensor:
    """Return the batch norm of a convolution.

    With fixed statistics, that is, where `affines` has the batch norm, both together are one
    convolution with other weights. This saves a pass over the feature map, forward and backward.
    """
    if bn not in affines:
        return bn(conv(x))
    scale, shift = affines[bn]
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding)


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

    def forward(self, x: Tensor, affines: Affines) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            shortcut = conv_bn(x, self.downsample[0], self.downsample[1], affines)
        x = F.relu(conv_bn(x, self.conv1, self.bn1, affines), inplace=True)
        x = F.relu(conv_bn(x, self.conv2, self.bn2, affines), inplace=True)
        x = conv_bn(x, self.conv3, self.bn3, affines)
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
        self.norms = []
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                self.norms.append(module)
            elif isinstance(module, nn.Conv2d):
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
        for norm in self.norms:
            norm.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResNet":
        super().train(mode)
        if self.frozen:
            for norm in self.norms:
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        affines = {}
        if not self.bn1.training:
            # Mixed precision may have cast the trained weights. Multiplied by fp32 they would be
            # fp32 and be cast once more, each by itself.
            affines = affines_of(self.norms, self.layer4[0].conv1.weight.dtype)
        x = F.relu(conv_bn(images, self.conv1, self.bn1, affines), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, affines)
            features.append(x)
        return features


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
