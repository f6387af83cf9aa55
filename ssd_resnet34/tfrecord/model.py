"""SSD300 on a truncated ResNet as TensorFlow pads it, with a class and a box head on each map.

Where TensorFlow's "same" padding of stride 2 is uneven, on even sizes, it is after the last row
and column only. Attribute names are the first recipe's; its fused heads `mbox` are two here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_resnet34.anchors import priors_per_cell
from ssd_resnet34.backbone import BasicBlock, make_backbone
from ssd_resnet34.tfrecord.config import Recipe

# Position of the max pool in the trunk, after the first recipe's ReLU.
POOL = (2, 1)
# A normal distribution cut at two standard deviations has this one.
TRUNCATED_STD = 0.87962566103423978


class UnevenConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2 on an even size, padded by 1 at the end only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def _extra(inputs: int, middle: int, last: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1), nn.ReLU(inplace=True), last, nn.ReLU(inplace=True)
    )


class SSD(nn.Module):
    """`model(images)`: (N, 3, 300, 300) to codes (N, 4, P) and logits (N, 1 + classes, P).

    Logit channel 0 is background. Outputs are raw and have the autocast's dtype.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.channels = 1 + num_classes
        self.model, inputs = make_backbone(recipe.backbone)
        # Without padding, but with a last window that reaches over the edge.
        self.model[POOL[0]][POOL[1]] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.additional_blocks = nn.ModuleList(
            [
                _extra(inputs, 256, UnevenConv2d(256, 512, 3, stride=2)),
                _extra(512, 256, nn.Conv2d(256, 512, 3, stride=2, padding=1)),
                _extra(512, 128, UnevenConv2d(128, 256, 3, stride=2)),
                _extra(256, 128, nn.Conv2d(128, 256, 3)),
                _extra(256, 128, nn.Conv2d(128, 256, 3)),
            ]
        )
        sources = (inputs, 512, 512, 256, 256, 256)
        shapes = priors_per_cell(recipe)
        self.class_net = nn.ModuleList(
            nn.Conv2d(source, shape * self.channels, 3, padding=1)
            for source, shape in zip(sources, shapes, strict=True)
        )
        self.box_net = nn.ModuleList(
            nn.Conv2d(source, shape * 4, 3, padding=1)
            for source, shape in zip(sources, shapes, strict=True)
        )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                std = module.weight[0].numel() ** -0.5 / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
        for part in (self.additional_blocks, self.class_net, self.box_net):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        source = self.model(images)
        sources = [source]
        for block in self.additional_blocks:
            source = block(source)
            sources.append(source)
        heads = zip(sources, self.class_net, self.box_net, strict=True)
        outputs = [
            (_flat(box_head(x), 4), _flat(class_head(x), self.channels))
            for x, class_head, box_head in heads
        ]
        codes, logits = zip(*outputs, strict=True)
        return torch.cat(codes, dim=2), torch.cat(logits, dim=2)


def _flat(raw: Tensor, channels: int) -> Tensor:
    """(N, shapes * channels, H, W), shape-major, to (N, channels, H * W * shapes)."""
    return raw.unflatten(1, (-1, channels)).permute(0, 2, 3, 4, 1).flatten(2)


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The network for `num_classes` foreground classes, with random weights."""
    return SSD(recipe, num_classes)
