"""What a piece of work asks of an NPU, counted: reads by the host, shapes, conversions, fallbacks.

with Audit() as audit:
    training.step(batch)
print(audit.table())
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.npu.device import has_kernel

# The size of their result depends on the data: the host must wait to know it.
DATA_DEPENDENT = {
    "_unique", "_unique2", "argwhere", "bincount", "histc", "masked_select", "nonzero",
    "nonzero_numpy", "unique_consecutive", "unique_dim",
}  # fmt: skip
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
# Data types that the AI core's kernel takes on a 910B and on a 910A; others go to the AI CPU.
SCATTERED = {torch.float32, torch.float16, torch.int32, torch.int8, torch.uint8}
REDUCED = {torch.float32, torch.float16, torch.int32, torch.uint8}  # by amax
BLOCK = 32  # bytes: a 910A may refuse to scatter into rows that are no multiple of it
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def ai_cpu_reason(kind: str, args: tuple, kwargs: dict) -> str | None:
    """Why the AI core of a 910B or a 910A would leave an operator to the AI CPU, or None.

    The rules are those of CANN's public operator sources (ops-math and ops-nn, 2026).
    """
    if not args or not isinstance(args[0], torch.Tensor):
        return None
    first = args[0]
    if kind in ("scatter", "scatter_"):
        if first.dtype not in SCATTERED:
            return f"{kind} of {first.dtype}"
        if first.shape[-1] * first.element_size() % BLOCK:
            return f"{kind} into rows of {first.shape[-1] * first.element_size()} bytes"
    if kind in ("scatter_add", "scatter_add_") and args[1] % first.ndim != first.ndim - 1:
        return f"{kind} along a dimension that is not the last"
    if kind in ("sort", "argsort") and not first.is_floating_point():
        return f"{kind} of {first.dtype}"
    if kind == "sum":
        counts = first.dtype in (torch.bool, torch.int32, torch.int64, torch.uint8)
        if counts and kwargs.get("dtype") in (None, torch.int64):
            return f"{kind} to int64"
    if kind in ("amax", "amin") and first.dtype not in REDUCED:
        return f"{kind} of {first.dtype}"
    if kind in ("floor_divide", "remainder") and first.dtype is torch.int64:
        return f"{kind} of int64"
    return None


class Audit(TorchDispatchMode):
    """Watches the operators of forward pass, backward pass and optimizer that touch an NPU.

    Every field but the last two is a Counter of what was found, by operator:
    host_reads: values and tensors that came to the host; data_dependent: results whose size the
    data decides, masks as indices among them; blocking_copies: host to device, waited for;
    fallbacks: operators without a kernel, which the CPU would run; ai_cpu: those that the chip's
    AI CPU would run, while its stream waits; float64: operators on it;
    casts: "from->to"; rearranged: copies of tensors that were not contiguous; kernels: what ran on
    the device, also from within C++. shapes: (operator, dtypes and shapes), of all; ops: count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host_reads, self.data_dependent = Counter(), Counter()
        self.blocking_copies, self.fallbacks, self.float64 = Counter(), Counter(), Counter()
        self.casts, self.rearranged, self.kernels = Counter(), Counter(), Counter()
        self.ai_cpu = Counter()
        self.shapes: set[tuple] = set()
        self.ops = 0

    def __enter__(self):
        torch.ops.simulated_npu.reset_calls()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.kernels.update(torch.ops.simulated_npu.take_calls())
        for name in [name for name in self.kernels if name.startswith("copy to ")]:
            count = self.kernels.pop(name)
            if name.startswith("copy to host"):
                self.host_reads[name] += count
            elif name.endswith("waiting"):
                self.blocking_copies[name] += count

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        target = torch.device(kwargs.get("device") or "cpu").type
        if target == "npu" or any(x.device.type == "npu" for x in tensors):
            self._note(op, args, kwargs, tensors)
        return op(*args, **kwargs)

    def _note(self, op, args, kwargs, tensors) -> None:
        name = op.name().removeprefix("aten::")
        kind = name.split(".")[0]
        self.ops += 1
        self.shapes.add((name, *((x.dtype, tuple(x.shape)) for x in tensors)))
        if kind in READS:
            self.host_reads[name] += 1
        by_tensor = kind == "repeat_interleave" and name.endswith(("Tensor", "self_Tensor"))
        if kind in DATA_DEPENDENT or by_tensor:
            self.data_dependent[name] += 1
        if kind in INDEXING and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None
        ):
            self.data_dependent[f"{name} by a mask"] += 1
        if any(x.dtype is torch.float64 for x in tensors) or kwargs.get("dtype") is torch.float64:
            self.float64[name] += 1
        if kind == "clone" and not args[0].is_contiguous():
            self.rearranged[tuple(args[0].shape)] += 1
        if kind in ("_to_copy", "copy_"):
            self._note_cast(args, kwargs)
        reason = ai_cpu_reason(kind, args, kwargs)
        if reason is not None:
            self.ai_cpu[reason] += 1
        if not has_kernel(op.name(), torch.device("npu")):
            self.fallbacks[name] += 1

    def _note_cast(self, args, kwargs) -> None:
        source = args[1] if len(args) > 1 else args[0]
        dtype = args[0].dtype if len(args) > 1 else kwargs.get("dtype") or source.dtype
        if dtype != source.dtype:
            short = (str(x).removeprefix("torch.") for x in (source.dtype, dtype))
            self.casts["->".join(short)] += 1

    def table(self) -> str:
        """One line a count, the most frequent operators beside it."""
        rows = [f"{'operators':<16} {self.ops:>6}"]
        for title in (
            "kernels", "host_reads", "data_dependent", "blocking_copies", "fallbacks", "ai_cpu",
            "float64", "casts", "rearranged",
        ):  # fmt: skip
            found = getattr(self, title)
            most = ", ".join(f"{name} {count}" for name, count in found.most_common(6))
            rows.append(f"{title:<16} {found.total():>6}  {most}".rstrip())
        return "\n".join(rows)
