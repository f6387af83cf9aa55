"""Mixed precision: O0 fp32, O1 autocast, O2 autocast with gradients reduced in half precision.

Weights, losses and the optimizer stay fp32. On npu and cuda the half type is fp16 with a loss
scale, static as the old ports had it or dynamic; on a CPU it is bf16, which needs none.
"""

import importlib
import re

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.optim import Optimizer

from common.errors import UserError
from common.npu.device import (
    fp32_shortcuts,
    has_bf16,
    has_infinity,
    in_host_memory,
    obstacle_to_fused_sgd,
)
from common.npu.operators import constant

LEVELS = ("O0", "O1", "O2")
LOSS_SCALE = re.compile(r"dynamic|[1-9]\d*(\.\d+)?")
NO_SCALE = "1"
GROUP_BYTES = 25 << 20  # of fp32 weights; DistributedDataParallel's buckets are as large


class Precision:
    """What a training step does differently by precision: autocast, backward, step.

    `dtype` is that of the network; `reduce_dtype` is what gradients travel in between ranks, None
    for their own. The dynamic scale of apex is not saved: a resumed run begins it anew.
    """

    def __init__(
        self,
        device: torch.device,
        level: str = "O0",
        loss_scale: str = NO_SCALE,
        dtype: str = "auto",
        backend: str = "native",
    ):
        if level not in LEVELS:
            raise UserError(f"--amp {level}: not one of {', '.join(LEVELS)}")
        if not LOSS_SCALE.fullmatch(loss_scale):
            raise UserError(f"--loss_scale {loss_scale}: not 'dynamic' or a number from 1 on")
        self.device = device
        self.level = level
        self.dtype = torch.float32
        self.apex = None
        if level != "O0":
            self.dtype = _half_dtype(device, dtype)
            if backend == "apex":
                self.apex = _import_apex()
        self.reduce_dtype = None
        if level == "O2" and self.apex is None:
            self.reduce_dtype = self.dtype
        self.loss_scale = NO_SCALE
        # An Ascend 910A, which has no infinity, convolves in fp16 whatever the type.
        if self.dtype is torch.float16 or not has_infinity(device):
            self.loss_scale = loss_scale
        self._set_up_native_scale()

    def _set_up_native_scale(self) -> None:
        """Set up one of two scales, the dynamic or the static one; the other does nothing."""
        native = self.apex is None
        dynamic = native and self.loss_scale == "dynamic"
        if dynamic and not has_infinity(self.device):
            raise UserError("--loss_scale dynamic: this NPU hides overflows; give a number")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dynamic)
        self.static_scale = 1.0
        if native and not dynamic:
            self.static_scale = float(self.loss_scale)

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, will_be_compiled: bool = False
    ) -> tuple[nn.Module, Optimizer]:
        """Return the network and the optimizer to train with; call it before going parallel.

        They are what apex makes of them. Without apex the optimizer is the same, and so is a
        network in fp32; one in half precision casts its weights in groups, unless it
        `will_be_compiled`: that joins casts by itself.
        """
        if self.apex is None:
            if self.dtype is not torch.float32 and not will_be_compiled:
                model = HalfWeights(model, self.dtype)
            return model, optimizer
        return self.apex.initialize(
            model, optimizer, opt_level=self.level, loss_scale=self.loss_scale
        )

    def autocast(self) -> torch.autocast:
        """Return the context of the network's forward pass; losses stay outside of it."""
        enabled = self.dtype is not torch.float32 and self.apex is None
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Run the backward pass of the scaled loss."""
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            return
        self.scaler.scale(loss).backward(constant(self.static_scale, loss.device))

    def step(
        self, optimizer: Optimizer, clip_norm: float = 0.0, clip_each: float = 0.0
    ) -> Tensor | None:
        """Unscale the gradients, clip them if asked, and update the weights.

        `clip_norm` limits the global norm, `clip_each` that of each parameter; 0 does not. Nothing
        is read back to the host but the one flag of a dynamic scale. Return the global norm before
        it is clipped (0-dim, on the device), or None where `clip_norm` is 0.
        """
        parameters = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameters.append(parameter)
        gradients = [parameter.grad for parameter in parameters]
        if self.static_scale != 1:
            torch._foreach_mul_(gradients, 1 / self.static_scale)
        if clip_each:
            self._clip_each(gradients, clip_each)
        norm = None
        if clip_norm:
            norm = self._clip_global(parameters, gradients, clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def _clip_each(self, gradients: list[Tensor], limit: float) -> None:
        """Scale each gradient down to the norm `limit`, in the unit of the dynamic scale."""
        norms = torch.stack(torch._foreach_norm(gradients))
        limits = self.scaler.scale(torch.full_like(norms, limit))
        factors = (limits / norms).clamp(max=1)
        torch._foreach_mul_(gradients, list(factors))

    def _clip_global(
        self, parameters: list[Tensor], gradients: list[Tensor], limit: float
    ) -> Tensor:
        """Scale all gradients down to the global norm `limit`; return the norm they had.

        The norm is unscaled here, the gradients only in the fused update: GradScaler.unscale_ would
        invert the scale in float64, which NPUs are slow at.
        """
        norm = nn.utils.get_total_norm(gradients)
        norm = norm / self.scaler.scale(torch.ones_like(norm))
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.level} ({dtype}, loss scale {self.loss_scale})"
        if self.dtype is torch.float32:
            shortcuts = fp32_shortcuts(self.device)
            if shortcuts:
                text += f", {', '.join(shortcuts)} (see --exact)"
        return f"apex {text}" if self.apex else text


class HalfWeights(nn.Module):
    """A network for training under autocast, whose weights are cast in groups instead of singly.

    The results are autocast's, bit by bit, where layers use the weights as they are. Where a
    network multiplies them before, as that of fcos does by frozen batch norms, it multiplies half
    weights: these and their gradients are rounded once more than with autocast. Autocast itself
    launches a kernel for each weight, and one for each gradient on the way back. On a CUDA device a
    group takes one. On an NPU, whose kernels for lists do not cast, it takes as many as autocast
    does.

    The weights are those of `nn.Conv2d` and `nn.Linear` that are trained. Whatever else has weights
    is left to autocast: it may compute with them in fp32.

    The gradients of a group are there when the last of them is. So that DistributedDataParallel
    goes on reducing some gradients while others are computed, the weights of a group are neighbours
    in the network, and a group is about as large as its buckets.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.groups = _groups(_weights_in_half(network))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        half_weights = {}
        for group in self.groups:
            casts = _CastTogether.apply(self.dtype, *group.values())
            half_weights.update(zip(group, casts, strict=True))
        # Each weight has one name here, also one of a module that the network has in two places.
        return functional_call(self.network, half_weights, (images,), tie_weights=False)


class _CastTogether(torch.autograd.Function):
    """Casts fp32 weights to a half type, and their gradients to fp32."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights)
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(casts, weights)
        return tuple(casts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *half_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = []
        destinations = []
        sources = []
        for weight, half_gradient in zip(ctx.saved_tensors, half_gradients, strict=True):
            gradient = None  # the weight was not used
            if half_gradient is not None:
                gradient = torch.empty_like(weight)
                destinations.append(gradient)
                sources.append(half_gradient)
            gradients.append(gradient)
        torch._foreach_copy_(destinations, sources)
        return None, *gradients


def _weights_in_half(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that autocast casts whenever they are used, by name."""
    weights = {}
    for prefix, module in network.named_modules():
        if type(module) not in (nn.Conv2d, nn.Linear):
            continue
        for name, parameter in module.named_parameters(prefix):
            if parameter.requires_grad:
                weights[name] = parameter
    return weights


def _groups(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split weights into groups in their order; one is full when it has GROUP_BYTES bytes.

    The last group is filled first: what is left over are the first weights, whose gradients come
    last, when there is nothing else to compute.
    """
    groups = []
    group_bytes = GROUP_BYTES
    for name, weight in reversed(weights.items()):
        if group_bytes >= GROUP_BYTES:
            groups.insert(0, {})
            group_bytes = 0
        groups[0][name] = weight
        group_bytes += weight.nbytes
    return groups


def default_level(device: torch.device, recipe_level: str) -> str:
    """Return the recipe's level on an accelerator; on a CPU O1 where bf16 is fast, else O0."""
    if not in_host_memory(device):
        return recipe_level
    return "O1" if has_bf16(device) else "O0"


def inference_precision(device: torch.device, name: str) -> Precision:
    """Return the precision "fp32", "fp16" or "bf16" of a network that is not trained.

    Raise UserError where the device does not have it.
    """
    if name == "fp32":
        return Precision(device)
    if name not in ("fp16", "bf16"):
        raise UserError(f"precision {name!r}: not one of fp32, fp16, bf16")
    if name == "fp16" and in_host_memory(device):
        raise UserError("precision 'fp16': of no use on a CPU", "take fp32 or bf16")
    if name == "bf16" and not in_host_memory(device) and not has_bf16(device):
        raise UserError(f"precision 'bf16': this {device.type} has none", "take fp32 or fp16")
    return Precision(device, "O1", dtype=name)


def build_sgd(parameters: list, device: torch.device, **options: float) -> torch.optim.SGD:
    """Return SGD in one fused kernel where the device has it; else in kernels over lists.

    `parameters` are tensors or groups of them; `options` are those of torch's SGD.
    """
    fused = obstacle_to_fused_sgd(device) is None
    optimizer = torch.optim.SGD(parameters, fused=fused, foreach=not fused, **options)
    # torch's fused kernel would take them uninitialised after a first step that overflowed.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the rate of every parameter group, times its "lr_factor" where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def _half_dtype(device: torch.device, requested: str) -> torch.dtype:
    """Return float16 on accelerators and bfloat16 on a CPU, or what was requested.

    `requested` is "auto", "fp16" or "bf16". Raise UserError where the device cannot use it.
    """
    refusal = UserError(
        f"--amp_dtype {requested}: of no use on this {device.type}; leave it to auto"
    )
    if in_host_memory(device):
        if requested == "fp16":
            raise refusal
        return torch.bfloat16
    if requested == "bf16":
        if not has_bf16(device):
            raise refusal
        return torch.bfloat16
    return torch.float16


def _import_apex():
    """Return the amp module of NVIDIA's or Ascend's apex."""
    try:
        return importlib.import_module("apex.amp")
    except ImportError as error:
        hint = "PyPI's apex is a web toolkit, not NVIDIA's or Ascend's; leave it to native"
        raise UserError(f"--amp_backend apex: {error}; {hint}") from None
