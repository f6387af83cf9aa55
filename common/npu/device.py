"""Device choice, and everything that differs between npu, cuda and cpu.

No other file outside `common/npu` asks for the kind of a device.
"""

import ctypes
import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common import __version__
from common.errors import UserError

OLDEST_TORCH = (2, 6)
KINDS = ("npu", "cuda", "cpu")  # in the order in which `auto` tries them
DEVICES = ("auto", *KINDS)
CANN_ADVICE = "source CANN's set_env.sh (bash: `source common/npu/env_npu.sh`)"
ASCEND = "/usr/local/Ascend"
CANN_OPERATORS = "libopapi.so"
FUSED_SGD_OF_CANN = "aclnnFusedSgd"
BF16_PROCESSOR_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and Arm in /proc/cpuinfo


def require_supported_torch() -> None:
    """Raise UserError where torch is older than what the programs need."""
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise UserError(
            f"torch {torch.__version__} is too old: {needed} is the oldest that works",
            f"pip install 'torch>={needed}' (on an NPU with the torch_npu of the same version)",
        )


def setup_device(name: str = "auto", index: int = 0) -> tuple[torch.device, str]:
    """Return the device of this process, ready to use, and a line saying why it was taken.

    `auto` takes the first that works of npu, cuda, cpu. Raise UserError where the named device
    cannot be used.
    """
    if name == "auto":
        kind, obstacles = _first_usable_kind()
    else:
        kind = name
        obstacles = []
        obstacle = _obstacle(kind)
        if obstacle is not None:
            raise UserError(f"--device {kind}: {obstacle}")
    reason = "; ".join(obstacles) if obstacles else "as asked"
    if kind == "cpu":
        return torch.device("cpu"), f"device: cpu, {torch.get_num_threads()} threads ({reason})"
    device = _setup_accelerator(kind, index)
    name = getattr(torch, kind).get_device_name(index)
    if not obstacles:
        return device, f"device: {device} {name}"
    return device, f"device: {device} {name} ({reason})"


def _first_usable_kind() -> tuple[str, list[str]]:
    """Return the first kind of device that works, and why those before it do not."""
    obstacles = []
    for kind in KINDS:
        obstacle = _obstacle(kind)
        if obstacle is None:
            return kind, obstacles
        obstacles.append(f"{kind}: {obstacle}")
    raise AssertionError("there always is a CPU")


def _obstacle(kind: str) -> str | None:
    """Return why a kind of device cannot be used, or None; load torch_npu on the way."""
    if kind == "cpu":
        return None
    if kind == "cuda":
        return None if torch.cuda.is_available() else "no CUDA device"
    return _obstacle_to_npu()


def _obstacle_to_npu() -> str | None:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if torch.version.cuda is not None:
        # Importing it would abort the process: torch's CUDA build and torch_npu exclude each other.
        return "this torch is a CUDA build, torch_npu needs the CPU build of the same version"
    # torch_npu 2.6 loads torch's compiler, which would start a pool of processes for each rank.
    # Nothing is compiled with it on an NPU.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        return f"torch_npu does not load ({first_line}); {CANN_ADVICE}"
    if not torch.npu.is_available():
        return f"torch_npu finds no NPU; check `npu-smi info` and {CANN_ADVICE}"
    return None


def _setup_accelerator(kind: str, index: int) -> torch.device:
    module = getattr(torch, kind)
    count = module.device_count()
    if index >= count:
        raise UserError(
            f"--device_id {index}: {count} {kind} devices here; give a smaller --device_id or "
            "start fewer processes"
        )
    module.set_device(index)
    if kind == "npu":
        # Plain layouts: nothing to cast back.
        torch.npu.config.allow_internal_format = False
        if torch.npu.is_bf16_supported():
            # Prebuilt kernels: one compilation less a shape. An Ascend 910A, the only one without
            # bf16, keeps torch_npu's mode: CANN 8.5 has no such convolutions for it any more.
            torch.npu.set_compile_mode(jit_compile=False)
    torch.backends.cudnn.benchmark = True  # shapes are few, see `many_shapes`
    return torch.device(kind, index)


def use_one_host_thread(device: torch.device) -> None:
    """Compute with one thread on the host of an NPU.

    torch_npu may bind the main thread to one core (CPU_AFFINITY_CONF=2), and those that it starts
    for the host's operators, which would wait for each other there, with it.
    """
    if device.type == "npu":
        torch.set_num_threads(1)


def has_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 is there; on a CPU: whether it is faster than fp32."""
    if device.type == "npu":
        return torch.npu.is_bf16_supported()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processor = Path("/proc/cpuinfo")
    if not processor.exists():
        return False
    flags = processor.read_text().split()
    return not BF16_PROCESSOR_FLAGS.isdisjoint(flags)


def has_infinity(device: torch.device) -> bool:
    """Return whether what overflows becomes infinite.

    On an Ascend 910A it stays at the largest number.
    """
    if device.type != "npu":
        return True
    import torch_npu

    return torch_npu.npu.utils.is_support_inf_nan()


def has_torchvision_operators() -> bool:
    """Return whether torchvision's operators are there and can be used.

    They are not where it is absent or built for another torch. Beside torch_npu it is not loaded:
    its wheels are built for torch's CUDA build, whose libraries the CPU build does not have.
    """
    if "torch_npu" in sys.modules:
        return False
    try:
        import torchvision  # noqa: F401 registers the operators
    except (ImportError, RuntimeError):
        return False
    return True


def overflow_happened(device: torch.device) -> bool:
    """Return whether a number was too large since this was last asked, where only the chip knows.

    That is an Ascend 910A, on which it stays at the largest number; everywhere else it becomes
    infinite and is found in the losses. The host waits for the device.
    """
    if has_infinity(device):
        return False
    import torch_npu

    happened = torch_npu.npu.utils.get_npu_overflow_flag()
    torch_npu.npu.utils.clear_npu_overflow_flag()
    return happened


def obstacle_to_fused_sgd(device: torch.device) -> str | None:
    """Return why torch's fused SGD does not run on the device, None where it does.

    An NPU needs a kernel of torch_npu's and one of CANN's, which came with torch_npu 2.13 and CANN
    9.1. Without the first, the step would run on the host; without the second, it is an error.
    """
    if device.type != "npu":
        return None
    if not has_bf16(device):
        return "an Ascend 910A has no kernel for it"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_sgd_", "PrivateUse1"):
        return "this torch_npu has no kernel for it"
    if not _cann_has(FUSED_SGD_OF_CANN):
        return f"this CANN has no {FUSED_SGD_OF_CANN}"
    return None


def _cann_has(function: str) -> bool:
    try:
        return hasattr(ctypes.CDLL(CANN_OPERATORS), function)
    except OSError:
        return False


def fp32_shortcuts(device: torch.device) -> list[str]:
    """Return which operators compute float32 in fewer bits on the device, each with the format.

    They are on by default, in torch for CUDA and in torch_npu; `be_exact` turns off what can be.
    """
    shortcuts = []
    if device.type == "cuda":
        if torch.backends.cudnn.allow_tf32:
            shortcuts.append("TF32 in convolutions")
        if torch.backends.cuda.matmul.allow_tf32:
            shortcuts.append("TF32 in matrix products")
    if device.type == "npu":
        if not has_bf16(device):
            return ["fp16 in convolutions and pooling, which a 910A has only so"]
        if torch.npu.conv.allow_hf32:
            shortcuts.append("HF32 in convolutions")
        if torch.npu.matmul.allow_hf32:
            shortcuts.append("HF32 in matrix products")
    return shortcuts


def be_exact(device: torch.device) -> None:
    """Compute float32 with all its bits, where the device can."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "npu":
        torch.npu.conv.allow_hf32 = False
        torch.npu.matmul.allow_hf32 = False


@contextmanager
def many_shapes() -> Iterator[None]:
    """Let cuDNN choose kernels by rule: to time them all for each of many shapes takes too long."""
    was_timed = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = was_timed


def be_deterministic(device: torch.device) -> None:
    """Give the same bits in every run on the same machine, where the device's kernels can."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=device.type == "npu")


def in_host_memory(device: torch.device) -> bool:
    """Return whether tensors of the device lie in the host's memory and operations wait for none.

    Everywhere else work is issued asynchronously, and a value read back waits for all of it.
    """
    return device.type == "cpu"


def use_in_this_thread(device: torch.device) -> None:
    """Make the device the current one of the calling thread, as it is for the main thread.

    Every thread has a current device of its own, which is the first card.
    """
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)


def get_random_state(device: torch.device) -> torch.Tensor | None:
    """Return the state of an accelerator's random generator, None of a CPU, which is torch's."""
    if device.type == "cpu":
        return None
    return getattr(torch, device.type).get_rng_state(device)


def set_random_state(device: torch.device, state: torch.Tensor | None) -> None:
    """Put back what `get_random_state` returned."""
    if state is not None:
        getattr(torch, device.type).set_rng_state(state, device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything issued so far."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def computes_in_half(device: torch.device) -> bool:
    """Return whether convolutions are in half precision whatever their type: an Ascend 910A's."""
    return not has_infinity(device)


def has_kernel(operator: str, device: torch.device) -> bool:
    """Return whether the device has a kernel for an operator ("aten::add.Tensor"), or needs none.

    An NPU leaves the others to the host, with a copy of every argument there and back.
    """
    if device.type != "npu":
        return True
    base, _, overload = operator.partition(".")
    out_form = f"{base}.{overload}_out" if overload else f"{base}.out"
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    # An operator that is made of others needs no kernel of its own.
    for key in ("CompositeExplicitAutograd", "CompositeImplicitAutograd"):
        if registered(operator, key):
            return True
    for name in (operator, out_form):
        if torch._C._dispatch_has_kernel(name) and registered(name, "PrivateUse1"):
            return True
    return False


def record_event(device: torch.device):
    """Return an event after everything issued so far, with `synchronize()`; None on a CPU."""
    if device.type == "cpu":
        return None
    return getattr(torch, device.type).current_stream().record_event()


def memory_mib(device: torch.device) -> int:
    """Return the peak memory in MiB: of tensors on the device, of the process on a CPU."""
    if device.type == "cpu":
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kibibytes >> 10
    return getattr(torch, device.type).max_memory_allocated(device) >> 20


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout convolutions are fastest in: channels last, but for the NPU."""
    if device.type == "npu":
        return torch.contiguous_format
    return torch.channels_last


def compiles_each_shape(device: torch.device) -> bool:
    """Return whether a shape met for the first time costs seconds to minutes."""
    return device.type == "npu"


def chunk_size(tensor: torch.Tensor) -> int:
    """Return how many images of a batch to process at a time.

    A CPU is fastest on what fits its cache, one image; everything else takes the whole batch. So
    does compiled code, which needs no arrays between its operations.
    """
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        return 1
    return len(tensor)


def device_versions(device: torch.device) -> list[str]:
    """Return a line for each version of driver, firmware and libraries that a device depends on."""
    if device.type == "cuda":
        capability = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
        return [
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
            f"compute capability {capability}"
        ]
    if device.type != "npu":
        return []
    lines = []
    toolkit = os.environ.get("ASCEND_TOOLKIT_HOME", f"{ASCEND}/ascend-toolkit/latest")
    for name, file in (
        ("driver", f"{ASCEND}/driver/version.info"),
        ("firmware", f"{ASCEND}/firmware/version.info"),
        ("CANN", f"{toolkit}/version.cfg"),
    ):
        path = Path(file)
        if path.is_file():
            words = path.read_text(errors="replace").split()
            lines.append(f"{name}: {' '.join(words)} ({path})")
        else:
            lines.append(f"{name}: {path} is not there")
    return lines


def versions() -> dict[str, str]:
    """Return the versions of what this run uses by their names, torch_npu's where it is loaded."""
    found = {
        "onestage": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if "torch_npu" in sys.modules:
        found["torch_npu"] = sys.modules["torch_npu"].__version__
    found["platform"] = platform.platform()
    return found


def environment() -> str:
    """Return one line for logs: the versions and the platform that this run uses."""
    texts = [f"{name} {version}" for name, version in versions().items() if name != "platform"]
    return ", ".join([*texts, platform.platform()])
