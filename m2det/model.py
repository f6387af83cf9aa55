"""M2Det: a base feature of two maps, eight U-shaped pyramids (TUMs) in a row, heads on all.

Paper: Zhao et al., AAAI 2019 (arXiv 1811.04533), section 3. Attribute names are the published
checkpoint's keys, so that a state dict of ours is one of theirs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2det.anchors import priors_per_cell
from m2det.backbone import make_backbone
from m2det.config import Recipe


class BasicConv(nn.Module):
    """Convolution without bias, BN, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, momentum=0.01)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def set_momentum(self, momentum: float) -> None:
        self.bn.momentum = momentum

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Leach(BasicConv):
    """The base feature reduced, one module for all levels: computed once, counted `uses` times.

    The original computes it anew for each level, on the same input: its running statistics move
    `uses` times a step towards the same values, which one step with a larger momentum equals.
    """

    def __init__(self, inputs: int, outputs: int, uses: int):
        super().__init__(inputs, outputs, 1)
        self.uses = uses
        self.set_momentum(self.bn.momentum)

    def set_momentum(self, momentum: float) -> None:
        self.bn.momentum = 1 - (1 - momentum) ** self.uses

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.bn.num_batches_tracked.add_(self.uses - 1)
        return super().forward(x)


class TUM(nn.Module):
    """Thinned U-shape module: (N, inputs, H, W) to maps of `planes` channels, smallest first."""

    def __init__(self, inputs: int, planes: int, scales: int, smooth: bool):
        super().__init__()
        downs = scales - 1
        self.layers = nn.Sequential(
            BasicConv(inputs, planes, 3, 2, 1),
            *(BasicConv(planes, planes, 3, 2, 1) for _ in range(downs - 2)),
            BasicConv(planes, planes, 3),
        )
        self.toplayer = nn.Sequential(BasicConv(planes, planes, 1))
        self.latlayer = nn.Sequential(
            *(BasicConv(planes, planes, 3, 1, 1) for _ in range(downs - 1)),
            BasicConv(inputs, planes, 3, 1, 1),
        )
        if smooth:
            self.smooth = nn.Sequential(*(BasicConv(planes, planes, 1) for _ in range(downs)))
        else:
            self.smooth = [nn.Identity()] * downs

    def forward(self, x: Tensor) -> list[Tensor]:
        downs = [x]
        for layer in self.layers:
            downs.append(layer(downs[-1]))
        up = self.toplayer(downs.pop())
        maps = [up]
        for lateral, smooth in zip(self.latlayer, self.smooth, strict=True):
            side = lateral(downs.pop())
            up = F.interpolate(up, size=side.shape[2:], mode="nearest") + side
            maps.append(smooth(up))
        return maps


class SFAM(nn.Module):
    """Scale-wise feature aggregation: channels of each map are weighted by what the map holds.

    Squeeze and excitation with one pair of layers for all scales, under a key for each.
    """

    def __init__(self, channels: int, scales: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.ModuleList([nn.Conv2d(channels, channels // reduction, 1)] * scales)
        self.fc2 = nn.ModuleList([nn.Conv2d(channels // reduction, channels, 1)] * scales)

    def forward(self, sources: list[Tensor]) -> list[Tensor]:
        weighted = []
        for source in sources:
            squeezed = F.relu(self.fc1[0](source.mean(dim=(2, 3), keepdim=True)), inplace=True)
            weighted.append(source * self.fc2[0](squeezed).sigmoid())
        return weighted


class M2Det(nn.Module):
    """`model(images)`: (N, 3, S, S) to offsets (N, P, 4) and logits (N, P, 1 + classes).

    Logit channel 0 is background. Outputs are raw and have the autocast's dtype.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        planes, levels, scales = recipe.planes, recipe.num_levels, len(recipe.prior_maps)
        self.channels = 1 + num_classes
        self.levels = levels
        for level in range(1, levels + 1):
            inputs = planes // 2 if level == 1 else planes // 2 + planes
            self.add_module(f"unet{level}", TUM(inputs, planes, scales, recipe.smooth))
        self.base = make_backbone(recipe.backbone)
        shallow, deep = self.base.channels
        self.reduce = BasicConv(shallow, planes, 3, 1, 1)
        self.up_reduce = BasicConv(deep, 2 * planes, 1)
        self.Norm = nn.BatchNorm2d(planes * levels)
        self.leach = nn.ModuleList([Leach(3 * planes, planes // 2, levels)] * levels)
        shapes = priors_per_cell(recipe)
        self.loc = self._heads(planes * levels, shapes * 4, scales)
        self.conf = self._heads(planes * levels, shapes * self.channels, scales)
        self.sfam_module = SFAM(planes * levels, scales) if recipe.sfam else None
        for module in self.modules():
            if isinstance(module, BasicConv):
                module.set_momentum(recipe.bn_momentum)

    @staticmethod
    def _heads(inputs: int, outputs: int, scales: int) -> nn.ModuleList:
        """3x3 convolutions; weights keep PyTorch's default, as the original's."""
        heads = nn.ModuleList(nn.Conv2d(inputs, outputs, 3, padding=1) for _ in range(scales))
        for head in heads:
            nn.init.zeros_(head.bias)
        return heads

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        sources = self.pyramid(self.base_feature(images))
        offsets, logits = [], []
        count = images.shape[0]
        for source, loc, conf in zip(sources, self.loc, self.conf, strict=True):
            # Channels last, a level's priors run over row, column, shape.
            offsets.append(loc(source).permute(0, 2, 3, 1).reshape(count, -1, 4))
            logits.append(conf(source).permute(0, 2, 3, 1).reshape(count, -1, self.channels))
        return torch.cat(offsets, dim=1), torch.cat(logits, dim=1)

    def base_feature(self, images: Tensor) -> Tensor:
        """FFMv1: both backbone maps side by side, (N, 3 * planes, S/8, S/8)."""
        shallow, deep = self.base(images)
        shallow = self.reduce(shallow)
        deep = F.interpolate(self.up_reduce(deep), size=shallow.shape[2:], mode="nearest")
        return torch.cat([shallow, deep], dim=1)

    def pyramid(self, base: Tensor) -> list[Tensor]:
        """The maps that the heads read, largest first, each with the channels of all levels."""
        leached = self.leach[0](base)
        pyramids, x = [], leached
        for level in range(1, self.levels + 1):
            pyramids.append(getattr(self, f"unet{level}")(x))
            x = torch.cat([leached, pyramids[-1][-1]], dim=1)  # FFMv2
        sources = [torch.cat(maps, dim=1) for maps in zip(*pyramids, strict=True)][::-1]
        if self.sfam_module is not None:
            sources = self.sfam_module(sources)
        return [self.Norm(sources[0]), *sources[1:]]


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The network for `num_classes` foreground classes, with random weights."""
    return M2Det(recipe, num_classes)
