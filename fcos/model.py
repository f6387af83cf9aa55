"""FCOS: backbone, feature pyramid, and one head for all levels.

Attribute names are the keys of the published checkpoints (`backbone`, `neck`, `bbox_head`), so the
state dict of this network has the published layout.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcos.anchors import MapSizes
from fcos.backbone import make_backbone
from fcos.config import GROUPS, Recipe

# No distance in an image is near exp(20). Without a limit, a background point whose distance
# overflows would get the gradient 0 * inf = nan.
LARGEST_EXPONENT = 20.0


class Outputs(NamedTuple):
    """Raw outputs: for each level from P3 to P7 a feature map (N, C, rows, columns)."""

    logits: tuple[Tensor, ...]  # C = number of classes
    # C = 4: left, top, right, bottom. fp32, in pixels, or in strides with `norm_on_bbox`.
    distances: tuple[Tensor, ...]
    centerness: tuple[Tensor, ...]  # C = 1, logits

    def map_sizes(self) -> MapSizes:
        """Return the size of each level's feature map."""
        sizes = []
        for logits in self.logits:
            rows, columns = logits.shape[2:]
            sizes.append((rows, columns))
        return tuple(sizes)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, distances and centerness of all points, each (N, P, C) in fp32.

        The points are in the order of `make_anchors`.
        """
        return flatten(self.logits), flatten(self.distances), flatten(self.centerness)


def flatten(maps: tuple[Tensor, ...]) -> Tensor:
    """Join feature maps (N, C, rows, columns) to (N, P, C) in fp32."""
    rows = [level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps]
    return torch.cat(rows, dim=1).float()


class ConvBlock(nn.Module):
    """A convolution, with group norm and ReLU in the head's towers, alone in the neck."""

    def __init__(self, conv: nn.Conv2d, norm: bool = False, relu: bool = False):
        super().__init__()
        self.conv = conv
        self.gn = nn.GroupNorm(GROUPS, conv.out_channels) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.gn is not None:
            x = self.gn(x)
        if self.relu:
            x = F.relu(x, inplace=True)
        return x


class FPN(nn.Module):
    """Feature maps C3, C4, C5 to P3 to P7, all with the same number of channels.

    Source: feature pyramid paper; P6 and P7 as in the FCOS paper, section 3.1. P6 is made from P5,
    and there is a ReLU before P7 only.
    """

    def __init__(self, in_channels: tuple[int, int, int], out_channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList()
        for channels in in_channels:
            self.lateral_convs.append(ConvBlock(nn.Conv2d(channels, out_channels, 1)))
        self.fpn_convs = nn.ModuleList()
        for stride in (1, 1, 1, 2, 2):
            conv = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1)
            self.fpn_convs.append(ConvBlock(conv))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        c3, c4, c5 = features
        merged5 = self.lateral_convs[2](c5)
        merged4 = self.lateral_convs[1](c4)
        merged4 = merged4 + F.interpolate(merged5, size=merged4.shape[2:], mode="nearest")
        merged3 = self.lateral_convs[0](c3)
        merged3 = merged3 + F.interpolate(merged4, size=merged3.shape[2:], mode="nearest")
        p3 = self.fpn_convs[0](merged3)
        p4 = self.fpn_convs[1](merged4)
        p5 = self.fpn_convs[2](merged5)
        p6 = self.fpn_convs[3](p5)
        p7 = self.fpn_convs[4](F.relu(p6))
        return [p3, p4, p5, p6, p7]


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
        channels = recipe.channels
        self.cls_convs = make_tower(recipe)
        self.reg_convs = make_tower(recipe)
        self.conv_cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.conv_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in recipe.strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        prior = recipe.prior_probability
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - prior) / prior))

    def forward(self, levels: list[Tensor]) -> Outputs:
        logits = []
        distances = []
        centerness = []
        for features, scale in zip(levels, self.scales, strict=True):
            level_logits, level_distances, level_centerness = self.predict(features, scale.scale)
            logits.append(level_logits)
            distances.append(level_distances)
            centerness.append(level_centerness)
        return Outputs(tuple(logits), tuple(distances), tuple(centerness))

    def predict(self, features: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, distances and centerness of one level."""
        cls_features = features
        for block in self.cls_convs:
            cls_features = block(cls_features)
        reg_features = features
        for block in self.reg_convs:
            reg_features = block(reg_features)

        logits = self.conv_cls(cls_features)
        distances = scale * self.conv_reg(reg_features).float()
        if self.norm_on_bbox:
            distances = F.relu(distances)
        else:
            distances = distances.clamp(max=LARGEST_EXPONENT).exp()
        if self.centerness_on_reg:
            centerness = self.conv_centerness(reg_features)
        else:
            centerness = self.conv_centerness(cls_features)
        return logits, distances, centerness


def make_tower(recipe: Recipe) -> nn.ModuleList:
    """Return the convolutions of one of the head's towers."""
    norm = recipe.head_norm == "gn"
    bias = recipe.conv_bias or not norm
    tower = nn.ModuleList()
    for _ in range(recipe.tower_convs):
        conv = nn.Conv2d(recipe.channels, recipe.channels, 3, padding=1, bias=bias)
        tower.append(ConvBlock(conv, norm, relu=True))
    return tower


class FCOS(nn.Module):
    """Normalised BGR images (N, 3, H, W) to `Outputs`, the same in training and evaluation.

    Logits and centerness have the dtype of the autocast, distances are fp32.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.backbone = make_backbone(recipe.backbone)
        self.neck = FPN(self.backbone.channels[1:], recipe.channels)
        self.bbox_head = Head(recipe, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        features = self.backbone(images)
        levels = self.neck(features[1:])
        return self.bbox_head(levels)


def backbone_stages(model: nn.Module) -> list[list[nn.Module]]:
    """Return the stages of the backbone, the first ones first, as `--freeze` counts them.

    The stem belongs to the first one, which is frozen in any case where there are weights.
    """
    backbone = model.backbone
    stem = [backbone.conv1, backbone.bn1]
    return [[*stem, backbone.layer1], [backbone.layer2], [backbone.layer3], [backbone.layer4]]


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the network for `num_classes` foreground classes, with random weights, not frozen."""
    return FCOS(recipe, num_classes)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Return the two groups of trained parameters for the optimizer.

    The biases of convolutions have no weight decay and a higher learning rate: train.py multiplies
    the rate by the group's `lr_factor`.
    """
    bias_ids = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            bias_ids.add(id(module.bias))
    biases = []
    others = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in bias_ids:
            biases.append(parameter)
        else:
            others.append(parameter)
    return [
        {"params": others, "lr_factor": 1.0},
        {"params": biases, "lr_factor": recipe.bias_lr_factor, "weight_decay": 0.0},
    ]
