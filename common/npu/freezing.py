"""Stages of a backbone that stay as they are in training."""

from torch import nn

from common.errors import UserError

WHOLE_BACKBONE = "backbone"  # a value of --freeze; others are numbers of stages


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that keeps its statistics, and is in evaluation mode, in training too."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        return super().train(False)


def number_of_stages(asked: str, available: int) -> int:
    """Return how many of the `available` stages `--freeze` asks for.

    Raise UserError for what is neither "backbone" nor a number of stages that there are.
    """
    if asked == "":
        return 0
    if asked == WHOLE_BACKBONE:
        return available
    if not asked.isdecimal() or int(asked) > available:
        raise UserError(
            f"--freeze {asked}: this backbone has {available} stages",
            f"give a number from 0 to {available}, or {WHOLE_BACKBONE}",
        )
    return int(asked)


def freeze_stages(stages: list[list[nn.Module]]) -> None:
    """Keep the weights of these stages, and the statistics of their batch norms, as they are."""
    for stage in stages:
        for layer in stage:
            layer.requires_grad_(False)
            for module in layer.modules():
                if isinstance(module, nn.BatchNorm2d):
                    # Another class keeps the names of the weights, which a wrapper would change.
                    module.__class__ = FrozenBatchNorm2d
                    module.eval()


def trained_line(model: nn.Module) -> str:
    """Return how many parameters of a network train."""
    total = 0
    trained = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
    return f"{trained / 1e6:.2f} of {total / 1e6:.2f} M parameters train"
