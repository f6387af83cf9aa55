"""VGG-16 with its classifier as convolutions ("reducedfc"), and ResNets kept at stride 8 longer.

The names of the modules are the keys of the published checkpoints, less their prefix `base.`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

# Entries of VGG's list of layers: a pool rounds an odd side down (POOL) or up (POOL_CEIL); a number
# is a convolution of so many times `width` channels.
POOL = "pool"
POOL_CEIL = "pool_ceil"
VGG16_LAYERS = (
    *(1, 1, POOL),
    *(2, 2, POOL),
    *(4, 4, 4, POOL_CEIL),
    *(8, 8, 8, POOL),
    *(8, 8, 8),
)
VGG_WIDTHS = {"vgg16": 64, "vgg16_thin": 8}  # the thin one is for quick tries: nothing pretrained
VGG_OUTPUTS = (22, 34)  # indices of the ReLUs after conv4_3 and fc7

STAGES = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}  # blocks of each stage
RESNET_WIDTHS = (64, 128, 256, 512)
RESNET_STRIDES = (1, 2, 1, 2)  # stage 3 does not downsample: M2Det's change


class VGG16(nn.ModuleList):
    """(N, 3, S, S) to conv4_3 (N, 512, S/8, S/8) and fc7 (N, 1024, S/16, S/16).

    Source: SSD paper, section 3. The 35 indices of the list are keys of the published checkpoints.
    """

    def __init__(self, width: int):
        layers = []
        channels = 3
        for entry in VGG16_LAYERS:
            if entry in (POOL, POOL_CEIL):
                layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=entry == POOL_CEIL))
            else:
                layers.append(nn.Conv2d(channels, entry * width, 3, padding=1))
                layers.append(nn.ReLU(inplace=True))
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
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for index, layer in enumerate(self):
            x = layer(x)
            if index in VGG_OUTPUTS:
                outputs.append(x)
        return tuple(outputs)


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 (with the stride) and 1x1 convolutions, as torchvision's."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        identity = x
        if self.downsample is not None:
            identity = self.downsample(x)
        return F.relu(out + identity, inplace=True)


class ResNet(nn.Module):
    """(N, 3, S, S) to stage 2 (N, 512, S/8, S/8) and stage 4 (N, 2048, S/16, S/16).

    Source: the paper on residual learning, section 4.
    """

    def __init__(self, depths: tuple[int, ...]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, depth in enumerate(depths):
            width = RESNET_WIDTHS[stage]
            blocks = [Bottleneck(channels, width, RESNET_STRIDES[stage])]
            channels = 4 * width
            for _ in range(depth - 1):
                blocks.append(Bottleneck(channels, width, stride=1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        # Published weights have it, nothing uses it; frozen, so that no rank awaits its gradient.
        self.fc = nn.Linear(channels, 1000).requires_grad_(False)
        self.channels = (512, 2048)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        shallow = self.layer2(self.layer1(x))
        deep = self.layer4(self.layer3(shallow))
        return shallow, deep


def stages_of(backbone: VGG16 | ResNet) -> list[list[nn.Module]]:
    """Return the stages of a backbone, the first ones first.

    Those of VGG end with a max pool, and the last one is fc6 and fc7. The first one of a ResNet
    begins with the stem.
    """
    if isinstance(backbone, ResNet):
        stem = [backbone.conv1, backbone.bn1]
        return [
            [*stem, backbone.layer1],
            [backbone.layer2],
            [backbone.layer3],
            [backbone.layer4],
        ]
    stages = [[]]
    for layer in backbone:
        stages[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            stages.append([])
    return stages


def make_backbone(name: str) -> nn.Module:
    """Return the backbone of that name, with He's random weights.

    Its `channels` are those of its two maps. Raise UserError for an unknown name.
    """
    if name in VGG_WIDTHS:
        return VGG16(VGG_WIDTHS[name])
    if name in STAGES:
        return ResNet(STAGES[name])
    names = ", ".join([*VGG_WIDTHS, *STAGES])
    raise UserError(f"--backbone {name}: is not one of {names}")
