"""Device choice, and the few things that differ between npu, cuda and cpu."""

import importlib.util
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from common.errors import UserError

DEVICES = ("auto", "npu", "cuda", "cpu")
_CANN = "source CANN's set_env.sh (bash: `source common/npu/env_npu.sh`)"


def _trouble(kind: str) -> str | None:
    """Why a kind of device cannot be used, or nothing; loads torch_npu on the way."""
    if kind != "npu":
        return None if kind == "cpu" or torch.cuda.is_available() else "no CUDA device"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if torch.version.cuda is not None:
        # Importing it would abort the process: torch's CUDA build and torch_npu exclude each other.
        return "this torch is a CUDA build, torch_npu needs the CPU build of the same version"
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu does not load ({str(error).strip().splitlines()[0]}); {_CANN}"
    if not torch.npu.is_available():
        return f"torch_npu finds no NPU; check `npu-smi info` and {_CANN}"
    return None


def setup_device(name: str = "auto", index: int = 0) -> tuple[torch.device, str]:
    """The device of this process, ready to use, and a line saying why it was taken.

    `auto` takes the first that works of npu, cuda, cpu. Raises UserError where the named device
    cannot be had.
    """
    passed = []
    for kind in DEVICES[1:] if name == "auto" else [name]:
        reason = _trouble(kind)
        if reason is None:
            break
        passed.append(f"{kind}: {reason}")
    else:
        raise UserError(f"--device {passed[0]}")
    if kind == "cpu":
        why = "; ".join(passed) or "as asked"
        return torch.device("cpu"), f"device: cpu, {torch.get_num_threads()} threads ({why})"
    module = getattr(torch, kind)
    if index >= (count := module.device_count()):
        raise UserError(f"--device_id {index}: {count} {kind} devices here; use fewer processes")
    module.set_device(index)
    if kind == "npu":
        # Prebuilt kernels and plain layouts: one compilation less per shape, nothing to cast back.
        torch.npu.set_compile_mode(jit_compile=False)
        torch.npu.config.allow_internal_format = False
    torch.backends.cudnn.benchmark = True  # every shape of a training step is fixed
    return torch.device(kind, index), f"device: {kind}:{index} {module.get_device_name(index)}"


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is there; on a CPU: whether it is faster than fp32."""
    if device.type == "npu":
        return torch.npu.is_bf16_supported()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    words = flags.read_text().split() if flags.exists() else ()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def has_infinity(device: torch.device) -> bool:
    """Whether what overflows becomes infinite; on an Ascend 910A it stays at the largest number."""
    if device.type != "npu":
        return True
    import torch_npu

    return torch_npu.npu.utils.is_support_inf_nan()


def be_deterministic(device: torch.device) -> None:
    """Same bits in every run on the same machine, where the device's kernels can."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=device.type == "npu")


def record_event(device: torch.device):
    """An event after everything issued so far, with `synchronize()`; None on a CPU."""
    if device.type == "cpu":
        return None
    return getattr(torch, device.type).current_stream().record_event()


def memory_mib(device: torch.device) -> int:
    """Peak memory in MiB: of tensors on the device, of the process on a CPU."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout convolutions are fastest in: channels last, but for the NPU."""
    return torch.contiguous_format if device.type == "npu" else torch.channels_last


def compiles_each_shape(device: torch.device) -> bool:
    """Whether a shape met for the first time costs seconds to minutes."""
    return device.type == "npu"


def chunk_size(tensor: torch.Tensor) -> int:
    """How much of a batch to take at a time: a CPU is fastest on what fits its cache, one image."""
    return 1 if tensor.device.type == "cpu" else len(tensor)


def environment() -> str:
    """One line for logs: what this run stands on."""
    packages = filter(None, (torch, sys.modules.get("torch_npu")))
    versions = [f"{package.__name__} {package.__version__}" for package in packages]
    return ", ".join([f"python {platform.python_version()}", *versions, platform.platform()])
