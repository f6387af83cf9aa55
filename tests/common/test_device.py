import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import __version__
from common.errors import UserError
from common.npu import device as module
from common.npu.device import (
    be_deterministic,
    chunk_size,
    compiles_each_shape,
    environment,
    has_bf16,
    memory_format,
    memory_mib,
    record_event,
    setup_device,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch):
    """No accelerator and a CPU build of torch, whatever this machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.fixture
def torch_npu(tmp_path, monkeypatch):
    """Puts a package `torch_npu` of this text first on the path."""

    def install(text):
        (tmp_path / "torch_npu").mkdir()
        (tmp_path / "torch_npu" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    sys.modules.pop("torch_npu", None)
    yield install
    sys.modules.pop("torch_npu", None)


@pytest.fixture
def _no_torch_npu(monkeypatch):
    real = module.importlib.util.find_spec
    without = lambda name, *rest: None if name == "torch_npu" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(module.importlib.util, "find_spec", without)


def refusal(name, index=0):
    with pytest.raises(UserError) as error:
        setup_device(name, index)
    assert "\n" not in str(error.value)
    return str(error.value)


BROKEN = 'raise ImportError("libhccl.so: cannot open shared object file\\nand more")'
NO_CARD = """
import torch
torch.npu = type("npu", (), {"is_available": staticmethod(lambda: False)})
"""


def test_a_torch_npu_without_cann_says_how_to_get_it(torch_npu):
    torch_npu(BROKEN)
    text = refusal("npu")
    assert text.startswith("--device npu: torch_npu does not load (libhccl.so: cannot open")
    assert "env_npu.sh" in text


def test_auto_passes_by_what_does_not_work_and_says_why(torch_npu):
    torch_npu(BROKEN)
    device, why = setup_device("auto")
    assert device == CPU
    assert "npu: torch_npu does not load (libhccl.so" in why
    assert "cuda: no CUDA device" in why
    assert "\n" not in why


def test_a_torch_npu_without_cards(torch_npu, monkeypatch):
    monkeypatch.setattr(torch, "npu", None, raising=False)
    torch_npu(NO_CARD)
    assert "finds no NPU; check `npu-smi info`" in refusal("npu")
    assert "npu: torch_npu finds no NPU" in setup_device("auto")[1]


def test_a_cuda_build_never_imports_torch_npu(torch_npu, monkeypatch, tmp_path):
    torch_npu(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    assert "CUDA build" in refusal("npu")
    assert "CUDA build" in setup_device("auto")[1]
    assert not (tmp_path / "imported").exists()


WITH_CARD = """
import torch
from types import SimpleNamespace
modes = []
torch.npu = SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: 1,
    set_device=lambda index: None,
    get_device_name=lambda index: "Ascend",
    is_bf16_supported=lambda: BF16,
    set_compile_mode=lambda jit_compile: modes.append(jit_compile),
    config=SimpleNamespace(allow_internal_format=True),
)
"""


@pytest.mark.parametrize(("bf16", "modes"), [("True", [False]), ("False", [])])
def test_a_910a_keeps_its_compile_mode(torch_npu, monkeypatch, bf16, modes):
    monkeypatch.setattr(torch, "npu", None, raising=False)
    monkeypatch.setattr(torch, "device", lambda kind, index: SimpleNamespace(type=kind))
    num_threads = torch.get_num_threads()
    torch_npu(WITH_CARD.replace("BF16", bf16))
    try:
        setup_device("npu")
    finally:
        torch.set_num_threads(num_threads)
    assert sys.modules["torch_npu"].modes == modes


@pytest.mark.usefixtures("_no_torch_npu")
def test_what_is_not_there():
    assert refusal("npu") == "--device npu: torch_npu is not installed"
    assert refusal("cuda") == "--device cuda: no CUDA device"
    device, why = setup_device("auto")
    assert device == CPU
    assert "npu: torch_npu is not installed; cuda: no CUDA device" in why


def test_a_cpu_that_was_asked_for(torch_npu):
    torch_npu("raise SystemExit('imported')")
    device, why = setup_device("cpu")
    assert device == CPU
    assert why == f"device: cpu, {torch.get_num_threads()} threads (as asked)"


@pytest.mark.usefixtures("_no_torch_npu")
def test_a_card_by_its_index(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    reasons = {"cuda": "", "auto": " (npu: torch_npu is not installed)"}
    for name, reason in reasons.items():
        device, why = setup_device(name, 1)
        assert device == torch.device("cuda", 1)
        assert why == f"device: cuda:1 card 1{reason}"
    assert taken == [1, 1]
    assert torch.backends.cudnn.benchmark
    expected = (
        "--device_id 2: 2 cuda devices here; give a smaller --device_id or start fewer processes"
    )
    assert refusal("cuda", 2) == expected


def test_bf16_of_a_cpu_is_read_from_its_flags(tmp_path, monkeypatch):
    for flags, expected in (
        ("fpu avx512f avx512_bf16", True),
        ("fpu amx_bf16 amx_tile", True),
        ("Features : asimd bf16 i8mm", True),
        ("fpu avx2 avx512f notbf16", False),
    ):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
        monkeypatch.setattr(module, "Path", lambda name: tmp_path / "cpuinfo")
        assert has_bf16(CPU) is expected
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / "none")
    assert has_bf16(CPU) is False


def test_what_differs_between_devices():
    npu = SimpleNamespace(type="npu")
    assert memory_format(npu) is torch.contiguous_format
    assert memory_format(CPU) is memory_format(torch.device("cuda")) is torch.channels_last
    assert chunk_size(torch.zeros(7, 2)) == 1
    assert chunk_size(torch.zeros(7, 2, device="meta")) == 7
    assert record_event(CPU) is None
    assert 20 < memory_mib(CPU) < 1 << 20
    assert environment().startswith(f"onestage {__version__}, python ")
    assert f"torch {torch.__version__}" in environment()


def test_deterministic(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        be_deterministic(CPU)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        be_deterministic(SimpleNamespace(type="npu"))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["HCCL_DETERMINISTIC"] == "true"


def test_importing_common_keeps_torch_from_loading_torch_npu_by_itself():
    code = "import os, sys, common; print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    command = [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.stdout.split() == ["0", "False"], made.stderr


def test_only_an_npu_compiles_each_shape():
    kinds = ("cpu", "cuda", "npu")
    devices = (SimpleNamespace(type=kind) for kind in kinds)
    assert [compiles_each_shape(device) for device in devices] == [False, False, True]
