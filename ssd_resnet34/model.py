"""SSD300 on a truncated ResNet: six feature maps, one fused 3x3 convolution on each.

Attribute names are the published checkpoint's keys (`model`, `additional_blocks`, `mbox`), so
that a state dict of ours is one of theirs.
"""

import torch
from torch import Tensor, nn

from ssd_resnet34.anchors import anchors_per_cell
from ssd_resnet34.backbone import STAGES, make_backbone
from ssd_resnet34.config import Recipe

# (middle, outputs, stride and padding of the 3x3) of the five extra blocks.
EXTRAS = (
    (256, 512, {"stride": 2, "padding": 1}),
    (256, 512, {"stride": 2, "padding": 1}),
    (128, 256, {"stride": 2, "padding": 1}),
    (128, 256, {}),
    (128, 256, {}),
)
# The ResNet-18 of NVIDIA's SSD example ends narrower.
LAST_OUTPUTS = {"resnet18": 128}


class SSD(nn.Module):
    """`model(images)`: (N, 3, 300, 300) to offsets (N, 4, P) and logits (N, 1 + classes, P).

    Logit channel 0 is background. Outputs are raw and have the autocast's dtype.
    """

    def __init__(self, recipe: Recipe, num_classes: int):
        super().__init__()
        self.channels = 1 + num_classes
        self.model, inputs = make_backbone(recipe.backbone)
        sources, blocks = [inputs], []
        *_, width = STAGES[recipe.backbone]  # 64; behind a trunk of half of it half will do
        for position, (middle, outputs, conv) in enumerate(EXTRAS):
            if position == len(EXTRAS) - 1:
                outputs = LAST_OUTPUTS.get(recipe.backbone, outputs)
            middle, outputs = middle * width // 64, outputs * width // 64
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(sources[-1], middle, 1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(middle, outputs, 3, **conv),
                    nn.ReLU(inplace=True),
                )
            )
            sources.append(outputs)
        self.additional_blocks = nn.ModuleList(blocks)
        self.mbox = nn.ModuleList(
            nn.Conv2d(source, shapes * (self.channels + 4), 3, padding=1)
            for source, shapes in zip(sources, anchors_per_cell(recipe), strict=True)
        )
        # Xavier over the whole fused head, as the port; biases keep PyTorch's default.
        for module in [*self.additional_blocks.modules(), *self.mbox]:
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        source = self.model(images)
        sources = [source]
        for block in self.additional_blocks:
            source = block(source)
            sources.append(source)

        offsets, logits = [], []
        for source, head in zip(sources, self.mbox, strict=True):
            raw = head(source)
            # Channels are (class, shape), then (coordinate, shape): a level's priors run over
            # shape, row, column.
            split = raw.shape[1] // (self.channels + 4) * self.channels
            logits.append(raw[:, :split].reshape(raw.shape[0], self.channels, -1))
            offsets.append(raw[:, split:].reshape(raw.shape[0], 4, -1))
        return torch.cat(offsets, dim=2), torch.cat(logits, dim=2)


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The network for `num_classes` foreground classes, with random weights."""
    return SSD(recipe, num_classes)
