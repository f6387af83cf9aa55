"""FCOS: backbone, feature pyramid, and one head for all levels.

Attribute names are the published checkpoint's keys (`backbone`, `neck`, `bbox_head`), so that a
state dict of ours is one of theirs.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcos.anchors import Sizes
from fcos.backbone import ResNet
from fcos.config import Recipe

# exp of more is no distance in any image. Without a limit, a background point that overflows
# would send 0 * inf = nan back.
LARGEST_EXPONENT = 20.0


class Outputs(NamedTuple):
    """Raw outputs: the maps (N, C, rows, columns) of levels P3 to P7."""

    logits: tuple[Tensor, ...]  # C = classes
    distances: tuple[Tensor, ...]  # C = 4: left, top, right, bottom; fp32, pixels (or strides)
    centerness: tuple[Tensor, ...]  # C = 1, logits

    def sizes(self) -> Sizes:
        """(rows, columns) of each level."""
        return tuple((x.shape[2], x.shape[3]) for x in self.logits)

    def flat(self) -> list[Tensor]:
        """The three as fp32 tensors (N, P, C), the points in the order of `make_anchors`."""
        return [
            torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], dim=1).float()
            for maps in self
        ]


class ConvBlock(nn.Module):
    """A convolution, with group norm and ReLU in the head's towers, alone in the neck."""

    def __init__(self, conv: nn.Conv2d, norm: bool = False, relu: bool = False):
        super().__init__()
        self.conv = conv
        self.gn = nn.GroupNorm(32, conv.out_channels) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.gn is not None:
            x = self.gn(x)
        return F.relu(x, inplace=True) if self.relu else x


class FPN(nn.Module):
    """C3, C4, C5 to P3..P7; feature pyramid paper, P6 from the output P5, ReLU before P7 only."""

    def __init__(self, inputs: list[int], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(
            ConvBlock(nn.Conv2d(count, channels, 1)) for count in inputs
        )
        self.fpn_convs = nn.ModuleList(
            ConvBlock(nn.Conv2d(channels, channels, 3, stride, padding=1))
            for stride in (1, 1, 1, 2, 2)
        )
        for block in (*self.lateral_convs, *self.fpn_convs):
            nn.init.xavier_uniform_(block.conv.weight)
            nn.init.zeros_(block.conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, features, strict=True)]
        for i in (2, 1):
            size = merged[i - 1].shape[2:]
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=size, mode="nearest")
        levels = [conv(x) for conv, x in zip(self.fpn_convs[:3], merged, strict=True)]
        levels.append(self.fpn_convs[3](levels[-1]))
        levels.append(self.fpn_convs[4](F.relu(levels[-1])))
        return levels


class Scale(nn.Module):
    """One learnable factor."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


class Head(nn.Module):
    """Two towers and three predictors, the same for all levels; FCOS paper, figure 2."""

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.norm_on_bbox = recipe.norm_on_bbox
        self.centerness_on_reg = recipe.centerness_on_reg
        channels, norm = recipe.channels, recipe.head_norm == "gn"

        def conv(outputs: int, bias: bool = True) -> nn.Conv2d:
            return nn.Conv2d(channels, outputs, 3, padding=1, bias=bias)

        def tower() -> nn.ModuleList:
            bias = recipe.conv_bias or not norm
            return nn.ModuleList(
                ConvBlock(conv(channels, bias), norm, relu=True) for _ in range(recipe.tower_convs)
            )

        self.cls_convs, self.reg_convs = tower(), tower()
        self.conv_cls, self.conv_reg, self.conv_centerness = conv(num_classes), conv(4), conv(1)
        self.scales = nn.ModuleList(Scale() for _ in recipe.strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        prior = recipe.prior_probability
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - prior) / prior))

    def forward(self, levels: list[Tensor]) -> Outputs:
        outputs = [self.level(x, s.scale) for x, s in zip(levels, self.scales, strict=True)]
        return Outputs(*zip(*outputs, strict=True))

    def level(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, distances and centerness of one level."""
        classes = boxes = x
        for block in self.cls_convs:
            classes = block(classes)
        for block in self.reg_convs:
            boxes = block(boxes)
        distances = scale * self.conv_reg(boxes).float()
        if self.norm_on_bbox:
            distances = F.relu(distances)
        else:
            distances = distances.clamp(max=LARGEST_EXPONENT).exp()
        centerness = self.conv_centerness(boxes if self.centerness_on_reg else classes)
        return self.conv_cls(classes), distances, centerness


class FCOS(nn.Module):
    """`model(images)`: (N, 3, H, W) normalised BGR to `Outputs`, the same in training and
    evaluation. Logits have the autocast's dtype."""

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.backbone = ResNet(recipe.backbone)
        self.neck = FPN(self.backbone.channels[1:], recipe.channels)
        self.bbox_head = Head(recipe, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        return self.bbox_head(self.neck(self.backbone(images)[1:]))


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The network for `num_classes` foreground classes, with random weights, nothing frozen."""
    return FCOS(recipe, num_classes)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """The optimizer's two groups; `lr_factor` is what the rate is multiplied by in each.

    Biases of convolutions have a higher rate and no decay.
    """
    biases = {
        id(module.bias)
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.bias is not None
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in biases]
    return [
        {"params": others, "lr_factor": 1.0},
        {
            "params": [p for p in trained if id(p) in biases],
            "lr_factor": recipe.bias_lr_factor,
            "weight_decay": 0.0,
        },
    ]
