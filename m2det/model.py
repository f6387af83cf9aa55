"""M2Det: a base feature of two maps, eight U-shaped modules (TUMs) in a row, heads on all scales.

Source: Zhao et al., AAAI 2019 (arXiv 1811.04533), section 3. The names of the attributes are the
keys of the published checkpoints, so both load into each other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.npu.sync_bn import SyncBatchNorm2d
from m2det.anchors import anchors_per_cell
from m2det.backbone import make_backbone, stages_of
from m2det.config import Recipe

COORDINATES = 4


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Return the batch norm of a feature map, without counting the batch: M2Det does."""
    if isinstance(norm, SyncBatchNorm2d):
        return norm.normalise(x)
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.training,
        norm.momentum,
        norm.eps,
    )


class BasicConv(nn.Module):
    """Convolution without bias, BN, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bn_momentum: float = 0.01,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, momentum=bn_momentum)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(batch_norm(self.conv(x), self.bn), inplace=True)


class Leach(BasicConv):
    """The reduction of the base feature for all levels, computed once instead of `uses` times.

    The original has one such module, too, but computes it anew for each level, on the same input.
    So its running statistics move `uses` times a step towards the same values; a single step with a
    larger momentum has the same effect.
    """

    def __init__(self, in_channels: int, out_channels: int, uses: int, bn_momentum: float = 0.01):
        momentum_of_all_uses = 1 - (1 - bn_momentum) ** uses
        super().__init__(in_channels, out_channels, 1, bn_momentum=momentum_of_all_uses)


class TUM(nn.Module):
    """Thinned U-shape module: (N, in_channels, H, W) to `scales` maps of `planes` channels.

    The smallest map comes first.
    """

    def __init__(
        self, in_channels: int, planes: int, scales: int, smooth: bool, bn_momentum: float
    ):
        super().__init__()

        def conv(in_channels: int, kernel_size: int, stride: int, padding: int) -> BasicConv:
            return BasicConv(in_channels, planes, kernel_size, stride, padding, bn_momentum)

        downs = [conv(in_channels, 3, stride=2, padding=1)]
        for _ in range(scales - 3):
            downs.append(conv(planes, 3, stride=2, padding=1))
        # The last map is so small that it shrinks by leaving out its border.
        downs.append(conv(planes, 3, stride=1, padding=0))
        self.layers = nn.Sequential(*downs)

        self.toplayer = nn.Sequential(conv(planes, 1, stride=1, padding=0))
        laterals = []
        for _ in range(scales - 2):
            laterals.append(conv(planes, 3, stride=1, padding=1))
        laterals.append(conv(in_channels, 3, stride=1, padding=1))
        self.latlayer = nn.Sequential(*laterals)

        if smooth:
            self.smooth = nn.Sequential(
                *[conv(planes, 1, stride=1, padding=0) for _ in range(scales - 1)]
            )
        else:
            self.smooth = nn.Sequential(*[nn.Identity() for _ in range(scales - 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        down_maps = [x]
        for layer in self.layers:
            down_maps.append(layer(down_maps[-1]))
        up = self.toplayer(down_maps.pop())
        maps = [up]
        for lateral, smooth in zip(self.latlayer, self.smooth, strict=True):
            side = lateral(down_maps.pop())
            up = F.interpolate(up, size=side.shape[2:], mode="nearest") + side
            maps.append(smooth(up))
        return maps


class SFAM(nn.Module):
    """Scale-wise feature aggregation: weight the channels of each map by what the map holds.

    It is squeeze and excitation with one pair of layers for all scales, which the published
    checkpoints hold under a key for each scale.
    """

    def __init__(self, channels: int, scales: int, reduction: int = 16):
        super().__init__()
        squeeze = nn.Conv2d(channels, channels // reduction, 1)
        excite = nn.Conv2d(channels // reduction, channels, 1)
        self.fc1 = nn.ModuleList([squeeze] * scales)
        self.fc2 = nn.ModuleList([excite] * scales)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        weighted = []
        for feature_map in maps:
            mean = feature_map.mean(dim=(2, 3), keepdim=True)
            squeezed = F.relu(self.fc1[0](mean), inplace=True)
            weight = self.fc2[0](squeezed).sigmoid()
            weighted.append(feature_map * weight)
        return weighted


class M2Det(nn.Module):
    """`model(images)`: (N, 3, S, S) to deltas (N, P, 4) and logits (N, P, 1 + num_classes).

    Channel 0 of the logits is the background. The outputs are raw and have the dtype of autocast.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        planes = recipe.planes
        scales = len(recipe.anchor_maps)
        momentum = recipe.bn_momentum
        leached = planes // 2
        self.num_levels = recipe.num_levels
        self.logit_channels = 1 + num_classes

        for level in range(1, self.num_levels + 1):
            in_channels = leached if level == 1 else leached + planes
            tum = TUM(in_channels, planes, scales, recipe.smooth, momentum)
            self.add_module(f"unet{level}", tum)
        self.base = make_backbone(recipe.backbone)
        shallow, deep = self.base.channels
        self.reduce = BasicConv(shallow, planes, 3, padding=1, bn_momentum=momentum)
        self.up_reduce = BasicConv(deep, 2 * planes, 1, bn_momentum=momentum)
        self.Norm = nn.BatchNorm2d(planes * self.num_levels)
        # One module under a key for each level, as in the published checkpoints.
        leach = Leach(3 * planes, leached, uses=self.num_levels, bn_momentum=momentum)
        self.leach = nn.ModuleList([leach] * self.num_levels)

        num_shapes = anchors_per_cell(recipe)
        head_channels = planes * self.num_levels
        self.loc = _make_heads(head_channels, num_shapes, COORDINATES)
        self.conf = _make_heads(head_channels, num_shapes, self.logit_channels)
        self.sfam_module = SFAM(head_channels, scales) if recipe.sfam else None
        self.norms = [self.Norm]
        for module in self.modules():
            if isinstance(module, BasicConv):
                self.norms.append(module.bn)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            self.count_batch()
        deltas = []
        logits = []
        maps = self.pyramid(self.base_feature(images))
        for feature_map, loc, conf in zip(maps, self.loc, self.conf, strict=True):
            deltas.append(_rows_of_anchors(loc(feature_map), COORDINATES))
            logits.append(_rows_of_anchors(conf(feature_map), self.logit_channels))
        return torch.cat(deltas, dim=1), torch.cat(logits, dim=1)

    def count_batch(self) -> None:
        """Count a batch in every batch norm but the backbone's, which count for themselves.

        Only the published checkpoints need these numbers. Each would be a kernel of its own.
        """
        torch._foreach_add_([norm.num_batches_tracked for norm in self.norms], 1)
        # The original uses this one for each level.
        self.leach[0].bn.num_batches_tracked.add_(self.num_levels - 1)

    def base_feature(self, images: Tensor) -> Tensor:
        """Return both maps of the backbone side by side, (N, 3 * planes, S/8, S/8).

        Source: FFMv1 of the paper.
        """
        shallow, deep = self.base(images)
        shallow = self.reduce(shallow)
        deep = F.interpolate(self.up_reduce(deep), size=shallow.shape[2:], mode="nearest")
        return torch.cat([shallow, deep], dim=1)

    def pyramid(self, base: Tensor) -> list[Tensor]:
        """Return the maps that the heads read, largest first, with the channels of all levels."""
        leached = self.leach[0](base)
        levels = []  # of each level its maps, smallest first
        for level in range(1, self.num_levels + 1):
            tum = getattr(self, f"unet{level}")
            tum_input = leached
            if levels:
                largest = levels[-1][-1]
                tum_input = torch.cat([leached, largest], dim=1)  # FFMv2 of the paper
            levels.append(tum(tum_input))
        maps = [torch.cat(of_scale, dim=1) for of_scale in zip(*levels, strict=True)]
        maps.reverse()
        if self.sfam_module is not None:
            maps = self.sfam_module(maps)
        maps[0] = batch_norm(maps[0], self.Norm)
        return maps


def _make_heads(
    in_channels: int, num_shapes: tuple[int, ...], channels_per_anchor: int
) -> nn.ModuleList:
    """Return a 3x3 convolution for each scale, which has so many anchors in a cell.

    As in the original, the weights keep PyTorch's default.
    """
    heads = nn.ModuleList()
    for shapes in num_shapes:
        head = nn.Conv2d(in_channels, shapes * channels_per_anchor, 3, padding=1)
        nn.init.zeros_(head.bias)
        heads.append(head)
    return heads


def _rows_of_anchors(output: Tensor, channels: int) -> Tensor:
    """Return a head's output (N, shapes * channels, H, W) as (N, H * W * shapes, channels).

    The rows are in the order of the anchors: row, column, shape.
    """
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, channels)


def backbone_stages(model: nn.Module) -> list[list[nn.Module]]:
    """Return the stages of the backbone, the first ones first, as `--freeze` counts them."""
    return stages_of(model.base)


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the network for `num_classes` foreground classes, with random weights."""
    return M2Det(recipe, num_classes)
