"""Ranks: start-up from torchrun or torch.distributed.launch, a few collectives, buffers."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError

# CPU tensors and objects go over gloo on every device, tensors on the device over its own.
BACKENDS = {"npu": "cpu:gloo,npu:hccl", "cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}
# HCCL gives up before torch's watchdog ends the process, so that the reason is logged.
HCCL_SHARE_OF_TIMEOUT = 0.9
HCCL_LONGEST_TIMEOUT = 17340  # seconds, HCCL_EXEC_TIMEOUT's limit on an Ascend 910A
NAME_OF_START = "start"  # a key of the ranks' store
SECONDS_BETWEEN_ANSWERS = 0.1


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
        """Return the index of this process's card.

        Of several processes each takes its local rank, a single one what it was asked to take.
        """
        if self.world_size > 1:
            return self.local_rank
        return device_id

    @staticmethod
    def from_environment() -> "Ranks":
        """Read the variables that torchrun and torch.distributed.launch --use_env set."""
        if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
            return Ranks()
        return Ranks(
            rank=int(os.environ["RANK"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )

    def any(self, flag: bool) -> bool:
        """Return, on every rank, whether the flag is set on at least one of them."""
        votes = torch.tensor(int(flag))  # on the CPU: asked at every step, it may not wait
        if self.world_size > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def all_gather_objects(self, value: object) -> list:
        """Return every rank's value, in order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: object) -> object:
        """Return the main rank's value on every rank, whose folders the others may not reach."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        self.any(False)


_is_alone = False  # see `alone`


@contextmanager
def alone() -> Iterator[None]:
    """Let this rank compute without the others: what `exchanges` guards is left out.

    So ranks may try what one of them has no memory for, without waiting for it.
    """
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def exchanges() -> bool:
    """Return whether several ranks compute a step together."""
    return dist.is_initialized() and not _is_alone


def may_be_restarted() -> bool:
    """Return whether torchrun may have started the processes anew, as --max_restarts allows.

    Its own count does not say so: it leaves out the restarts after a node has come or gone.
    """
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def start(device: torch.device, ranks: Ranks, timeout_seconds: float = 1800) -> None:
    """Join the process group, if there is more than one rank.

    Raise UserError where the ranks do not come together.
    """
    if ranks.world_size == 1:
        return
    # Imported later, its default arguments keep the group for ever, and gloo's threads may then
    # abort the process at its end.
    from torch.distributed.nn import functional  # noqa: F401

    hccl_seconds = min(HCCL_SHARE_OF_TIMEOUT * timeout_seconds, HCCL_LONGEST_TIMEOUT)
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", f"{hccl_seconds:.0f}")
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        name_of_start = meet(store, ranks, timeout)
        dist.init_process_group(
            BACKENDS[device.type],
            store=dist.PrefixStore(name_of_start, store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
            # torch 2.6 takes it for CUDA alone; an NPU was chosen by set_device.
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistBackendError:  # of NCCL or HCCL, which says what
        raise
    except RuntimeError as error:  # of a store or of gloo
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the ranks do not meet ({reason})",
            "see whether all of them run; each node must reach the --local_addr of the others",
        ) from error


def meet(store: dist.Store, ranks: Ranks, timeout: timedelta) -> str:
    """Return a name for this start of the ranks, the same on all, once all of them are there.

    torchrun's store outlives ranks that are started anew, and keeps the addresses of the former
    ones. So rank 0 names each start, the others answer with a token of their own, and rank 0 says
    whose tokens it has. A rank that has answered a former start asks again. Raise
    torch.distributed.DistStoreError where the others do not come in time.
    """
    if ranks.main:
        name = uuid.uuid4().hex
        store.set(NAME_OF_START, name)
        answers = [f"{name}/{rank}" for rank in range(1, ranks.world_size)]
        store.wait(answers, timeout)
        tokens = [store.get(answer).decode() for answer in answers]
        store.set(f"{name}/all", " ".join(tokens))
        return name
    token = uuid.uuid4().hex
    give_up = time.monotonic() + timeout.total_seconds()
    store.wait([NAME_OF_START], timeout)
    while time.monotonic() < give_up:
        name = store.get(NAME_OF_START).decode()
        store.set(f"{name}/{ranks.rank}", token)
        if store.check([f"{name}/all"]) and token in store.get(f"{name}/all").decode().split():
            return name
        time.sleep(SECONDS_BETWEEN_ANSWERS)
    raise dist.DistStoreError("rank 0 does not answer")


def parallel(model: nn.Module, reduce_dtype: torch.dtype | None) -> nn.Module:
    """Wrap a network in DistributedDataParallel, which leaves its buffers alone.

    Else every rank would start with those of rank 0; a resumed rank has its own. Gradients travel
    in `reduce_dtype`, None for their own.
    """
    buffer_names = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffer_names)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if reduce_dtype is not None:
        wrapped.register_comm_hook(reduce_dtype, _mean_in_dtype)
    return wrapped


def _mean_in_dtype(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Replace a bucket of gradients by its mean over ranks, which travels in `dtype`.

    torch's own hook for bfloat16 refuses all devices but CUDA.
    """
    share = bucket.buffer().to(dtype).div_(dist.get_world_size())
    future = dist.all_reduce(share, async_op=True).get_future()
    return future.then(lambda reduced: bucket.buffer().copy_(reduced.value()[0]))


def gather_buffers(model: nn.Module, ranks: Ranks) -> list[dict[str, Tensor]]:
    """Return every rank's floating buffers (BN running statistics) on the CPU, in rank order."""
    buffers = {}
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffers[name] = buffer.cpu()
    return ranks.all_gather_objects(buffers)


def mean_buffers(buffers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean over ranks of what `gather_buffers` returned."""
    means = {}
    for name in buffers[0]:
        means[name] = torch.stack([of_rank[name] for of_rank in buffers]).mean(dim=0)
    return means


def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Replace BN running statistics by their mean over ranks, on every rank."""
    means = mean_buffers(gather_buffers(model, ranks))
    model.load_state_dict(means, strict=False)
