"""Ranks: start-up from torchrun or torch.distributed.launch, a few collectives, buffers."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
        if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
            return Ranks()
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        return Ranks(*(int(os.environ.get(name, 1)) for name in names))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank; every rank gets the same answer."""
        votes = torch.tensor(int(flag))  # on the CPU: asked at every step, it may not wait
        if self.world_size > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def all_gather_objects(self, value: object) -> list:
        """Every rank's value, in order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: object) -> object:
        """The main rank's value, on every rank: its folder may be out of the others' reach."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        self.any(False)


def start(device: torch.device, ranks: Ranks, timeout_seconds: float = 1800) -> None:
    """Join the process group, if there is more than one rank."""
    if ranks.world_size > 1:
        # Imported later, its default arguments keep the group for ever, and gloo's threads may then
        # abort the process at its end.
        from torch.distributed.nn import functional  # noqa: F401

        # HCCL gives up before torch's watchdog ends the process, so that the reason is logged.
        os.environ.setdefault("HCCL_EXEC_TIMEOUT", f"{0.9 * timeout_seconds:.0f}")
        card, timeout = None if device.type == "cpu" else device, timedelta(seconds=timeout_seconds)
        dist.init_process_group(BACKENDS[device.type], timeout=timeout, device_id=card)


def parallel(model: nn.Module, half: torch.dtype | None) -> nn.Module:
    """DistributedDataParallel that leaves buffers alone; `half`: dtype gradients travel in."""
    buffers = [name for name, _ in model.named_buffers()]
    # Else every rank would start with those of rank 0; a resumed rank has its own.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if half is not None:
        wrapped.register_comm_hook(half, _reduce_in)
    return wrapped


def _reduce_in(half: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Mean of a bucket of gradients over ranks; torch's own for bfloat16 refuses all but CUDA."""
    small = bucket.buffer().to(half).div_(dist.get_world_size())
    future = dist.all_reduce(small, async_op=True).get_future()
    return future.then(lambda reduced: bucket.buffer().copy_(reduced.value()[0]))


def gather_buffers(model: nn.Module, ranks: Ranks) -> list[dict[str, Tensor]]:
    """Every rank's floating buffers (BN running statistics) on the CPU, in rank order."""
    floating = ((name, b) for name, b in model.named_buffers() if b.is_floating_point())
    return ranks.all_gather_objects({name: buffer.cpu() for name, buffer in floating})


def mean_buffers(buffers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over ranks of what `gather_buffers` brought."""
    return {name: torch.stack([rank[name] for rank in buffers]).mean(0) for name in buffers[0]}


def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Replace BN running statistics by their mean over ranks, on every rank."""
    model.load_state_dict(mean_buffers(gather_buffers(model, ranks)), strict=False)
