"""The selfcheck on the simulated NPU, and on an Ascend 910A, which computes in half precision."""

import importlib

import pytest

import selfcheck
from common.npu.selfcheck import Golden, run_phase

pytestmark = pytest.mark.npu_sim


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910A"])
@pytest.mark.parametrize("model", selfcheck.MODELS)
def test_every_phase_but_training_passes(npu, model, soc, monkeypatch):
    monkeypatch.setenv("SIMULATED_NPU_SOC", soc)
    golden = Golden(model)
    for phase in importlib.import_module(f"{model}.selfcheck").PHASES[:-1]:
        # Not only the kernels: what torch_npu asks at its start is the 910B's here.
        if soc == "Ascend910A":
            phase = phase._replace(tolerance=phase.tolerance_in_half)
        outcome = run_phase(phase, golden, npu)
        assert outcome.passed, outcome.line(model)
        assert not outcome.without_kernel
