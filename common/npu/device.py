"""Device choice, and the few things that differ between npu, cuda and cpu."""

import importlib.util
import os
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from common.npu.errors import UserError

DEVICES = ("auto", "npu", "cuda", "cpu")
_CANN = "source CANN's set_env.sh (bash: `source common/npu/env_npu.sh`)"


def _npu_trouble() -> str | None:
    """Why the NPU cannot be used, or nothing; loads torch_npu on the way."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if torch.version.cuda is not None:
        # Importing it would abort the process: torch's CUDA build and torch_npu exclude each other.
        return "this torch is a CUDA build, torch_npu needs the CPU build of the same version"
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0]
        return f"torch_npu does not load ({first_line}); {_CANN}"
    if not torch.npu.is_available():
        return f"torch_npu finds no NPU; check `npu-smi info` and {_CANN}"
    return None


def _cuda_trouble() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


def setup_device(name: str = "auto", index: int = 0) -> tuple[torch.device, str]:
    """The device of this process, ready to use, and a line saying why it was taken.

    `auto` takes the first that works of npu, cuda, cpu. Raises UserError where the named device
    cannot be had.
    """
    passed = []
    for kind, trouble in (("npu", _npu_trouble), ("cuda", _cuda_trouble)):
        if name not in (kind, "auto"):
            continue
        reason = trouble()
        if reason is None:
            return _accelerator(kind, index), f"device: {kind}:{index} {_name(kind, index)}"
        if name == kind:
            raise UserError(f"--device {kind}: {reason}")
        passed.append(f"{kind}: {reason}")
    if name not in ("auto", "cpu"):
        raise UserError(f"--device {name}: not one of {', '.join(DEVICES)}")
    why = f" ({'; '.join(passed)})" if passed else " (as asked)"
    return torch.device("cpu"), f"device: cpu, {torch.get_num_threads()} threads{why}"


def _accelerator(kind: str, index: int) -> torch.device:
    module = getattr(torch, kind)
    if index >= module.device_count():
        raise UserError(
            f"{kind} device {index} does not exist, there are {module.device_count()}; "
            "start fewer processes or give another --device_id"
        )
    module.set_device(index)
    if kind == "npu":
        # Prebuilt kernels and plain layouts: one compilation less per shape, nothing to cast back.
        torch.npu.set_compile_mode(jit_compile=False)
        torch.npu.config.allow_internal_format = False
    else:
        torch.backends.cudnn.benchmark = True  # every shape of a training step is fixed
    return torch.device(kind, index)


def _name(kind: str, index: int) -> str:
    return getattr(torch, kind).get_device_name(index)


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is there; on a CPU: whether it is faster than fp32."""
    if device.type == "npu":
        return torch.npu.is_bf16_supported()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text().split()) if flags.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def be_deterministic(device: torch.device) -> None:
    """Same bits in every run on the same machine, where the device's kernels can."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=device.type == "npu")


def synchronize(device: torch.device) -> None:
    """Wait for everything issued to the device."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def record_event(device: torch.device):
    """An event after everything issued so far, with `synchronize()`; None on a CPU."""
    if device.type == "cpu":
        return None
    event = getattr(torch, device.type).Event()
    event.record()
    return event


def memory_mib(device: torch.device) -> int:
    """Peak memory in MiB: of tensors on the device, of the process on a CPU."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout convolutions are fastest in: channels last, but for the NPU."""
    return torch.contiguous_format if device.type == "npu" else torch.channels_last


def images_at_once(tensor: Tensor) -> int:
    """How much of a batch to take at a time: a CPU is fastest on what fits its cache, one image."""
    return 1 if tensor.device.type == "cpu" else len(tensor)


def environment(device: torch.device) -> str:
    """One line for logs: what this run stands on."""
    import platform

    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    if device.type == "npu":
        import torch_npu

        parts.append(f"torch_npu {torch_npu.__version__}")
    name = platform.processor() if device.type == "cpu" else _name(device.type, device.index or 0)
    return ", ".join([*parts, f"{device.type} {name}".strip(), platform.platform()])
