"""Ranks: start-up from torchrun or torch.distributed.launch, a few collectives, shutdown."""

import inspect
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.npu.errors import UserError

# CPU tensors and objects go over gloo on every device, tensors on the device over its own.
BACKENDS = {"npu": "cpu:gloo,npu:hccl", "cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Ranks:
    """This process among all; without a process group, the only one."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def card(self, device_id: int = 0) -> int:
        """Index of this process's card: its local rank, or what a single process asked for."""
        return self.local_rank if self.world_size > 1 else device_id

    @staticmethod
    def from_environment() -> "Ranks":
        """From the variables that torchrun and torch.distributed.launch --use_env set."""
        names = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}
        try:
            found = {field: int(os.environ[name]) for field, name in names.items()}
        except KeyError:
            return Ranks()
        except ValueError as error:
            raise UserError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers: {error}") from None
        return Ranks(**found, local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank; every rank gets the same answer."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def gather_objects(self, value: object) -> list | None:
        """Every rank's value, in order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.main else None
        dist.gather_object(value, values)
        return values

    def all_gather_objects(self, value: object) -> list:
        """Every rank's value, in order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        self.any(False)


def start(device: torch.device, ranks: Ranks, timeout_seconds: float = 1800) -> None:
    """Join the process group, if there is more than one rank."""
    if ranks.world_size == 1:
        return
    dist.init_process_group(
        BACKENDS[device.type],
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=None if device.type == "cpu" else device,
    )


def shutdown() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def parallel(model: nn.Module, device: torch.device, half: torch.dtype | None) -> nn.Module:
    """DistributedDataParallel without buffer broadcasts; `half`: dtype gradients travel in."""
    # torch 2.13 renamed the argument.
    parameters = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    own = [buffer.clone() for buffer in model.buffers()]
    wrapped = DistributedDataParallel(
        model,
        device_ids=None if device.type == "cpu" else [device.index],
        gradient_as_bucket_view=True,
        **{sync: False},
    )
    # And since then it starts with rank 0's buffers everywhere; a resumed rank has its own.
    for buffer, value in zip(model.buffers(), own, strict=True):
        buffer.copy_(value)
    if half is not None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        hooks = {torch.float16: "fp16_compress_hook", torch.bfloat16: "bf16_compress_hook"}
        wrapped.register_comm_hook(None, getattr(default_hooks, hooks[half]))
    return wrapped


def gather_buffers(model: nn.Module, ranks: Ranks) -> list[dict[str, torch.Tensor]] | None:
    """Every rank's floating buffers (BN running statistics) on the CPU of rank 0."""
    buffers = {
        name: buffer.detach().cpu().clone()
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }
    return ranks.gather_objects(buffers)


def mean_buffers(buffers: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean over ranks of what `gather_buffers` brought."""
    return {name: torch.stack([rank[name] for rank in buffers]).mean(0) for name in buffers[0]}


@torch.no_grad()
def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Replace BN running statistics by their mean over ranks, on every rank."""
    if ranks.world_size == 1:
        return
    gathered = gather_buffers(model, ranks)
    means = ranks.broadcast(mean_buffers(gathered) if gathered else None)
    for name, buffer in model.named_buffers():
        if name in means:
            buffer.copy_(means[name])
