"""ResNet up to its third stage, kept at stride 8 (MLPerf's change: stage 3 does not downsample).

Residual learning paper, section 4; post-activation, stride in the 3x3 convolution, as torchvision.
"""

from torch import Tensor, nn

from common.errors import UserError

# name: (blocks of stages 1 to 3, bottleneck?, width of stage 1). resnet10 is for quick tries: of
# half width, and nobody has weights for it.
STAGES = {
    "resnet10": ((1, 1, 1), False, 32),
    "resnet18": ((2, 2, 2), False, 64),
    "resnet34": ((3, 4, 6), False, 64),
    "resnet50": ((3, 4, 6), True, 64),
}


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """Projection of the shortcut where the shape changes, else nothing."""
    if stride == 1 and inputs == outputs:
        return None
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def make_backbone(name: str) -> tuple[nn.Sequential, int]:
    """The trunk, (N, 3, 300, 300) to (N, C, 38, 38), and C.

    Its positions are the published keys: 0 conv1, 1 bn1, 2 pool, 3 to 5 the stages. Convolutions
    start He-normal (fan out), as torchvision's.
    """
    if name not in STAGES:
        raise UserError(f"--backbone {name}: is not one of {', '.join(STAGES)}")
    depths, bottleneck, channels = STAGES[name]
    widths = channels, 2 * channels, 4 * channels
    block = Bottleneck if bottleneck else BasicBlock
    stem = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
    pool = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1))
    layers = [stem, nn.BatchNorm2d(channels), pool]
    for depth, width, stride in zip(depths, widths, (1, 2, 1), strict=True):
        blocks = []
        for position in range(depth):
            blocks.append(block(channels, width, stride if position == 0 else 1))
            channels = width * block.expansion
        layers.append(nn.Sequential(*blocks))
    backbone = nn.Sequential(*layers)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone, channels
