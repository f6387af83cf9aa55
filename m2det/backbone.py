"""VGG-16 with its classifier as convolutions ("reducedfc"), and ResNets kept at stride 8 longer.

Module names are the published keys below `base.`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

# Convolutions (channels in units of the width) and pools: "M" halves, "C" halves rounding up.
VGG = (1, 1, "M", 2, 2, "M", 4, 4, 4, "C", 8, 8, 8, "M", 8, 8, 8)
VGG_WIDTHS = {"vgg16": 64, "vgg16_thin": 8}  # the thin one is for quick tries, it has no weights
VGG_TAPS = (22, 34)  # conv4_3 and fc7, both behind their ReLU

RESNET_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class VGG16(nn.ModuleList):
    """(N, 3, S, S) to conv4_3 (N, 512, S/8, S/8) and fc7 (N, 1024, S/16, S/16).

    SSD paper section 3; the 35 positions of the list are the published keys.
    """

    def __init__(self, width: int):
        layers, channels = [], 3
        for entry in VGG:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=entry == "C"))
                continue
            layers += [nn.Conv2d(channels, entry * width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = entry * width
        layers += [
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(channels, 16 * width, 3, padding=6, dilation=6),
            nn.ReLU(inplace=True),
            nn.Conv2d(16 * width, 16 * width, 1),
            nn.ReLU(inplace=True),
        ]
        super().__init__(layers)
        self.channels = (8 * width, 16 * width)
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        taps = []
        for position, layer in enumerate(self):
            x = layer(x)
            if position in VGG_TAPS:
                taps.append(x)
        return tuple(taps)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, as torchvision's."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """(N, 3, S, S) to stage 2 (N, 512, S/8, S/8) and stage 4 (N, 2048, S/16, S/16).

    Residual learning paper, section 4; stage 3 does not downsample, M2Det's change.
    """

    def __init__(self, depths: tuple[int, ...]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        stages = zip(depths, (64, 128, 256, 512), (1, 2, 1, 2), strict=True)
        for number, (depth, width, stride) in enumerate(stages, 1):
            blocks = []
            for position in range(depth):
                blocks.append(Bottleneck(channels, width, stride if position == 0 else 1))
                channels = 4 * width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        # Published weights have it, nothing uses it; frozen, so that no rank awaits its gradient.
        self.fc = nn.Linear(channels, 1000).requires_grad_(False)
        self.channels = (512, 2048)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, stride=2, padding=1)
        shallow = self.layer2(self.layer1(x))
        return shallow, self.layer4(self.layer3(shallow))


def make_backbone(name: str) -> nn.Module:
    """The network of that name, randomly initialised (He); `channels` are those of its two maps."""
    if name in VGG_WIDTHS:
        return VGG16(VGG_WIDTHS[name])
    if name in RESNET_BLOCKS:
        return ResNet(RESNET_BLOCKS[name])
    raise UserError(f"--backbone {name}: is not one of {', '.join((*VGG_WIDTHS, *RESNET_BLOCKS))}")
