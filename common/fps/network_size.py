"""How large a network is: its parameters, and the operations of its forward pass."""

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")  # tensors that have a shape and no values: nothing is computed


def num_parameters(model: nn.Module) -> int:
    """Return the number of values that a network learns or has learned."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, height: int, width: int) -> int:
    """Return the floating-point operations for one image of that size in pixels.

    Those of convolutions and matrix products; a multiplication and an addition are two.
    """
    state = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        state[name] = value.detach().to(META)
    # Two: in training a batch norm refuses a single value a channel, as M2Det's last map has.
    images = torch.empty(2, 3, height, width, device=META)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        # tie_weights would leave the tensors of a module that has two names, as M2Det has, on meta.
        functional_call(model, state, (images,), tie_weights=False)
    return counter.get_total_flops() // len(images)


def size_line(model: nn.Module, height: int, width: int) -> str:
    """Return a line with the parameters, and the operations for an image of that size in pixels."""
    millions = num_parameters(model) / 1e6
    billions = count_flops(model, height, width) / 1e9
    return (
        f"network: {millions:.1f} M parameters, {billions:.1f} GFLOPs an image of {width} x "
        f"{height} pixels (multiplication and addition are two)"
    )
