"""Mixed precision: O0 fp32, O1 autocast, O2 autocast with gradients reduced in half precision.

Weights, losses and the optimizer stay fp32. On npu and cuda the half type is fp16 with a loss
scale, static as the old ports had it or dynamic; on a CPU it is bf16, which needs none.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.npu.device import has_bf16
from common.npu.errors import UserError

LEVELS = ("O0", "O1", "O2")


class Precision:
    """What a training step does differently by precision: autocast, backward, step."""

    def __init__(
        self,
        device: torch.device,
        level: str = "O0",
        loss_scale: str = "dynamic",
        dtype: str = "auto",
        backend: str = "native",
    ):
        if level not in LEVELS:
            raise UserError(f"--amp {level}: not one of {', '.join(LEVELS)}")
        self.device, self.level = device, level
        self.dtype = self._dtype(dtype)
        self.apex = _apex() if backend == "apex" and level != "O0" else None
        self.static_scale, self.scaler = 1.0, None
        static_scale = None if loss_scale == "dynamic" else _positive(loss_scale)
        if self.dtype is torch.float16:
            if static_scale is None:
                self.scaler = torch.amp.GradScaler(device.type)
            else:
                self.static_scale = static_scale

    def _dtype(self, wanted: str) -> torch.dtype:
        if self.level == "O0":
            return torch.float32
        if self.device.type == "cpu":
            if wanted == "fp16":
                raise UserError(
                    "--amp_dtype fp16: of no use on a CPU; leave it to bf16 or --amp O0"
                )
            return torch.bfloat16
        if wanted == "bf16":
            if not has_bf16(self.device):
                raise UserError(f"--amp_dtype bf16: this {self.device.type} has none; use fp16")
            return torch.bfloat16
        return torch.float16

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """The dtype gradients travel in between ranks, None for their own."""
        return self.dtype if self.level == "O2" and self.apex is None else None

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """With apex, its patched model and optimizer; call before going parallel."""
        if self.apex is None:
            return model, optimizer
        scale = "dynamic" if self.scaler is not None else self.static_scale
        self.scaler, self.static_scale = None, 1.0
        return self.apex.initialize(model, optimizer, opt_level=self.level, loss_scale=scale)

    def autocast(self) -> torch.autocast:
        """Around the forward pass of the network; losses stay outside."""
        enabled = self.dtype is not torch.float32 and self.apex is None
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Scaled backward pass."""
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
        elif self.scaler is not None:
            self.scaler.scale(loss).backward()
        else:
            (loss * self.static_scale if self.static_scale != 1 else loss).backward()

    def step(self, optimizer: Optimizer, clip_norm: float = 0.0) -> None:
        """Unscale, clip the global norm if asked, update. Nothing is read back to the host,
        but for the one flag of a dynamic scale."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        params = [p for p in params if p.grad is not None]
        if self.static_scale != 1:
            torch._foreach_mul_([p.grad for p in params], 1 / self.static_scale)
        if clip_norm:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, clip_norm)
        if self.scaler is not None:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()

    def state_dict(self) -> dict:
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state: dict) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

    def __str__(self) -> str:
        if self.level == "O0":
            return "O0 (fp32)"
        scale = "dynamic" if self.scaler is not None else f"{self.static_scale:g}"
        kind = "apex " if self.apex is not None else ""
        return f"{kind}{self.level} ({str(self.dtype).removeprefix('torch.')}, loss scale {scale})"


def default_level(device: torch.device, recipe_level: str) -> str:
    """The recipe's level on an accelerator; on a CPU O1 where bf16 is fast there, else O0."""
    if device.type != "cpu":
        return recipe_level
    return "O1" if has_bf16(device) else "O0"


def build_sgd(
    params: list, device: torch.device, lr: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD in one fused kernel where the device has it; on an Ascend 910A one kernel per list."""
    fused = device.type != "npu" or has_bf16(device)  # 910A: has neither
    return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--loss_scale {text}: not 'dynamic' or a number above 0")
    return value


def _apex():
    """The amp module of NVIDIA's or Ascend's apex."""
    try:
        import apex
    except ImportError as error:
        raise UserError(f"--amp_backend apex: {error}; leave it to native") from None
    if not hasattr(apex, "amp"):
        raise UserError(
            "--amp_backend apex: the installed package 'apex' is the web toolkit of that name, "
            "not NVIDIA's or Ascend's; leave it to native"
        )
    from apex import amp

    return amp
