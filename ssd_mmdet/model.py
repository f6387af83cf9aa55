"""SSD on VGG16: six feature maps (seven for 512 pixels), two 3x3 convolutions on each.

Attribute names are the keys of MMDetection's checkpoints before 2.14, so that a state dict of ours
is one of theirs.
"""

import torch
from torch import Tensor, nn

from common.errors import UserError
from ssd_mmdet.anchors import anchors_per_cell
from ssd_mmdet.config import Recipe
from ssd_mmdet.winograd import Conv2d

# Outputs of VGG16's 3x3 convolutions; "M" a 2x2 max pool that keeps the odd row and column.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
FIRST_LEVEL = 22  # position in `features` of the ReLU whose output, normalised, is level 0
# Channels of the 1x1 and of the second convolution of each extra level; kernel, stride and padding
# of the second.
EXTRAS = {
    300: (
        (256, 512, (3, 2, 1)),
        (128, 256, (3, 2, 1)),
        (128, 256, (3, 1, 0)),
        (128, 256, (3, 1, 0)),
    ),
    512: (
        (256, 512, (3, 2, 1)),
        (128, 256, (3, 2, 1)),
        (128, 256, (3, 2, 1)),
        (128, 256, (3, 2, 1)),
        (128, 256, (4, 1, 1)),
    ),
}


class L2Norm(nn.Module):
    """Scales each place's channel vector to length `weight`, in fp32 whatever the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        # As good as length + 1e-10, the original's; but that the ONNX exporter takes for + 0.
        length = wide.square().sum(dim=1, keepdim=True).clamp(min=1e-20).sqrt()
        return (self.weight.view(1, -1, 1, 1) * wide / length).to(x.dtype)


class Backbone(nn.Module):
    """VGG16 with dilated fc6 and fc7 as convolutions, and the extra levels after it."""

    def __init__(self, recipe: Recipe):
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(channels * recipe.width))

        layers, inputs = [], 3
        for step in VGG16:
            if step == "M":
                layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
                continue
            outputs = scaled(step)
            layers += [Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = outputs
        wide = scaled(1024)
        layers += [
            nn.MaxPool2d(3, 1, padding=1),
            nn.Conv2d(inputs, wide, 3, padding=6, dilation=6),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, wide, 1),
            nn.ReLU(inplace=True),
        ]
        self.features = nn.Sequential(*layers)
        self.levels = [scaled(512), wide]  # channels
        self.extra = nn.ModuleList()
        for middle, outputs, (kernel, stride, padding) in EXTRAS[recipe.image_size]:
            middle, inputs = scaled(middle), self.levels[-1]
            self.levels.append(scaled(outputs))
            self.extra += [
                nn.Conv2d(inputs, middle, 1),
                nn.Conv2d(middle, self.levels[-1], kernel, stride, padding),
            ]
        self.l2_norm = L2Norm(self.levels[0])
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        for layer in self.extra:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels, x = [], images
        for position, layer in enumerate(self.features):
            x = layer(x)
            if position == FIRST_LEVEL:
                levels.append(self.l2_norm(x))
        levels.append(x)
        for position, layer in enumerate(self.extra):
            x = layer(x).relu_()
            if position % 2:
                levels.append(x)
        return levels


class Head(nn.Module):
    """Class and box convolutions of every level."""

    def __init__(self, recipe: Recipe, levels: list[int], channels: int):
        super().__init__()
        self.channels = channels
        shapes = anchors_per_cell(recipe)
        self.reg_convs, self.cls_convs = (
            nn.ModuleList(
                Conv2d(inputs, count * outputs, 3, padding=1)
                for inputs, count in zip(levels, shapes, strict=True)
            )
            for outputs in (4, channels)
        )
        for layer in [*self.reg_convs, *self.cls_convs]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        offsets = [
            _flat(conv(level), 4) for conv, level in zip(self.reg_convs, levels, strict=True)
        ]
        logits = [
            _flat(conv(level), self.channels)
            for conv, level in zip(self.cls_convs, levels, strict=True)
        ]
        return torch.cat(offsets, dim=1), torch.cat(logits, dim=1)


def _flat(raw: Tensor, outputs: int) -> Tensor:
    """(N, shapes * outputs, H, W) to (N, H * W * shapes, outputs)."""
    return raw.permute(0, 2, 3, 1).reshape(raw.shape[0], -1, outputs)


class SSD(nn.Module):
    """`model(images)`: (N, 3, 300, 300) to offsets (N, P, 4) and logits (N, P, classes + 1).

    The last logit is background. Outputs are raw and have the autocast's dtype.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.backbone = Backbone(recipe)
        self.bbox_head = Head(recipe, self.backbone.levels, num_classes + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.bbox_head(self.backbone(images))


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The network for `num_classes` foreground classes, with random weights.

    Raises UserError for an image size that no SSD was designed for.
    """
    if recipe.image_size not in EXTRAS:
        raise UserError(f"image_size {recipe.image_size}: not one of {', '.join(map(str, EXTRAS))}")
    return SSD(recipe, num_classes)
