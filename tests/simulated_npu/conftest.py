"""The tests marked `npu_sim` need the simulated NPU; without it they skip, with one reason."""

import os

import pytest

MISSING = os.environ.get("SIMULATED_NPU_MISSING")
if MISSING is None and "SIMULATED_NPU" not in os.environ:
    MISSING = "not started by `bash run_tests.sh tests/simulated_npu`"


def pytest_configure(config):
    config.addinivalue_line("markers", "npu_sim: runs on the simulated NPU")


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
    from common.npu.device import setup_device

    return setup_device("npu")[0]
