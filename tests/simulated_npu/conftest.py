"""The tests marked `npu_sim` need the simulated NPU; without it they skip, with one reason.

Those marked `every_version` are the ones that run with the older versions of torch_npu as well.
"""

import os

import pytest
import torch

from common.npu import device, precision

MISSING = os.environ.get("SIMULATED_NPU_MISSING")
if MISSING is None and "SIMULATED_NPU" not in os.environ:
    MISSING = "not started by `bash run_tests.sh tests/simulated_npu`"


def pytest_configure(config):
    config.addinivalue_line("markers", "npu_sim: runs on the simulated NPU")
    config.addinivalue_line("markers", "every_version: runs with each torch_npu (--all)")


def pytest_collection_modifyitems(items):
    for item in items:
        if MISSING is not None and item.get_closest_marker("npu_sim"):
            item.add_marker(pytest.mark.skip(reason=f"no simulated NPU: {MISSING}"))


def pytest_terminal_summary(terminalreporter):
    """The tables that tests gave to `record_property("audit", ...)`."""
    for report in terminalreporter.getreports("passed"):
        for name, table in report.user_properties:
            if name == "audit":
                terminalreporter.write(f"\n{table}\n")


@pytest.fixture(scope="session")
def missing():
    """Why there is no simulated NPU, or None."""
    return MISSING


@pytest.fixture(scope="session")
def npu():
    """The first simulated NPU, set up as the product does it."""
    return device.setup_device("npu")[0]


@pytest.fixture
def on_npu(npu, monkeypatch):
    """Makes a test that was written for the CPU compute on the NPU.

    What comes from numpy goes to the NPU, what goes to numpy comes to the host, and tensors are
    made on the NPU where no device is named.
    """
    from_numpy, numpy = torch.from_numpy, torch.Tensor.numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).to(npu))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: numpy(tensor.cpu()))
    with npu:
        yield


@pytest.fixture
def sgd_of_the_npu(npu, monkeypatch):
    """Makes a CPU update weights with the kernels that the NPU has, whose last bits differ."""
    obstacle = device.obstacle_to_fused_sgd(npu)
    monkeypatch.setattr(precision, "obstacle_to_fused_sgd", lambda _: obstacle)


@pytest.fixture
def sorts_in_half(monkeypatch):
    """Makes the kernels those of an Ascend 910A, which sorts and convolves in half precision."""
    monkeypatch.setenv("SIMULATED_NPU_SOC", "Ascend910A")
