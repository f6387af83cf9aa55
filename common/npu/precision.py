"""Mixed precision: O0 fp32, O1 autocast, O2 autocast with gradients reduced in half precision.

Weights, losses and the optimizer stay fp32. On npu and cuda the half type is fp16 with a loss
scale, static as the old ports had it or dynamic; on a CPU it is bf16, which needs none.
"""

import importlib
import re

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError
from common.npu.device import has_bf16, has_infinity


class Precision:
    """What a training step does differently by precision: autocast, backward, step.

    dtype: of the network; reduce_dtype: what gradients travel in between ranks, None for their own.
    """

    def __init__(self, device, level="O0", loss_scale="dynamic", dtype="auto", backend="native"):
        if level not in ("O0", "O1", "O2"):
            raise UserError(f"--amp {level}: not one of O0, O1, O2")
        if not re.fullmatch(r"dynamic|[1-9]\d*(\.\d+)?", loss_scale):
            raise UserError(f"--loss_scale {loss_scale}: not 'dynamic' or a number from 1 on")
        self.device, self.level = device, level
        self.dtype = torch.float32 if level == "O0" else _half(device, dtype)
        self.apex = _apex() if backend == "apex" and level != "O0" else None
        self.reduce_dtype = self.dtype if level == "O2" and not self.apex else None
        self.loss_scale = loss_scale if self.dtype is torch.float16 else "1"
        # Native: one of these two scales, the other does nothing.
        dynamic = self.loss_scale == "dynamic"
        if dynamic and not self.apex and not has_infinity(device):
            raise UserError("--loss_scale dynamic: this NPU hides overflows; give a number")
        self.scaler = torch.amp.GradScaler(device.type, enabled=dynamic and not self.apex)
        self.static_scale = 1.0 if dynamic or self.apex else float(self.loss_scale)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """With apex, its patched model and optimizer; call before going parallel."""
        if self.apex is None:
            return model, optimizer
        options = {"opt_level": self.level, "loss_scale": self.loss_scale}
        return self.apex.initialize(model, optimizer, **options)

    def autocast(self) -> torch.autocast:
        """Around the forward pass of the network; losses stay outside."""
        enabled = self.dtype is not torch.float32 and self.apex is None
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Scaled backward pass."""
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
        else:
            self.scaler.scale(loss * self.static_scale).backward()

    def step(self, optimizer: Optimizer, clip_norm=0.0, clip_each=0.0) -> Tensor | None:
        """Unscale, clip each parameter's norm or the global one if asked, update. Nothing is read
        back to the host, but for the one flag of a dynamic scale. Returns the global norm before
        it is clipped, if that is asked."""
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        grads, norm = [p.grad for p in params], None
        if self.static_scale != 1:
            torch._foreach_mul_(grads, 1 / self.static_scale)
        if clip_each:
            norms = torch.stack(torch._foreach_norm(grads))
            factors = self.scaler.scale(torch.full_like(norms, clip_each)) / norms
            torch._foreach_mul_(grads, list(factors.clamp(max=1)))
        if clip_norm:
            # The norm is unscaled, the gradients only in the fused update: GradScaler.unscale_
            # would invert the scale in float64, which NPUs are slow at.
            norm = nn.utils.get_total_norm(grads)
            norm = norm / self.scaler.scale(torch.ones_like(norm))
            nn.utils.clip_grads_with_norm_(params, clip_norm, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def __str__(self) -> str:
        kind, dtype = "apex " if self.apex else "", str(self.dtype).removeprefix("torch.")
        return f"{kind}{self.level} ({dtype}, loss scale {self.loss_scale})"


def default_level(device: torch.device, recipe_level: str) -> str:
    """The recipe's level on an accelerator; on a CPU O1 where bf16 is fast there, else O0."""
    level_on_cpu = "O1" if has_bf16(device) else "O0"
    return level_on_cpu if device.type == "cpu" else recipe_level


def build_sgd(params: list, device: torch.device, **options: float) -> torch.optim.SGD:
    """SGD in one fused kernel where the device has it; on an Ascend 910A one kernel per list."""
    fused = device.type != "npu" or has_bf16(device)  # 910A: has neither
    optimizer = torch.optim.SGD(params, fused=fused, **options)
    # torch's fused kernel would take them uninitialised after a first step that overflowed.
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _half(device: torch.device, wanted: str) -> torch.dtype:
    """float16 on accelerators, bfloat16 on a CPU or as `wanted` ("auto", "fp16", "bf16")."""
    on_cpu = device.type == "cpu"
    if not on_cpu and wanted != "bf16":
        return torch.float16
    if wanted == "fp16" or not (on_cpu or has_bf16(device)):
        raise UserError(f"--amp_dtype {wanted}: of no use on this {device.type}; leave it to auto")
    return torch.bfloat16


def _apex():
    """The amp module of NVIDIA's or Ascend's apex."""
    try:
        return importlib.import_module("apex.amp")
    except ImportError as error:
        hint = "PyPI's apex is a web toolkit, not NVIDIA's or Ascend's; leave it to native"
        raise UserError(f"--amp_backend apex: {error}; {hint}") from None
