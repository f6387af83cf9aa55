"""ResNet in caffe's form: a bottleneck's stride sits in its first 1x1 convolution.

Residual learning paper, section 4; attribute names are the published keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

# Bottlenecks of the four stages; resnet14 is for quick tries, it has no published weights.
STAGES = {"resnet50": (3, 4, 6, 3), "resnet14": (1, 1, 1, 1)}


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """Batch norm of a convolution. With fixed statistics it is one convolution of other weights:
    no pass over the feature map of its own, forward or backward."""
    if bn.training:
        return bn(conv(x))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    bias = bn.bias - bn.running_mean * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, project: bool):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if project:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(conv_bn(x, self.conv1, self.bn1), inplace=True)
        out = F.relu(conv_bn(out, self.conv2, self.bn2), inplace=True)
        out = conv_bn(out, self.conv3, self.bn3)
        out += x if self.downsample is None else conv_bn(x, *self.downsample)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """(N, 3, H, W) to C2..C5 at strides 4, 8, 16, 32.

    Starts from random weights, all of which train, with every residual branch at 0 (bn3). `freeze`
    is for pretrained ones.
    """

    def __init__(self, name: str):
        super().__init__()
        if name not in STAGES:
            raise UserError(f"--backbone {name}: is not one of {', '.join(STAGES)}")
        self.frozen = False
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.channels, inputs = [], 64
        for stage, depth in enumerate(STAGES[name]):
            width, blocks = 64 * 2**stage, []
            for position in range(depth):
                first = position == 0
                blocks.append(Bottleneck(inputs, width, 2 if first and stage else 1, first))
                inputs = width * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(inputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def freeze(self) -> None:
        """For pretrained weights: stem and C2 stay as they are, and so does every batch norm."""
        self.frozen = True
        for part in (self.conv1, self.bn1, self.layer1):
            part.requires_grad_(False)
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
        outputs = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            outputs.append(x)
        return outputs
