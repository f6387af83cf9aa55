"""The selfcheck on the simulated NPU, and on an Ascend 910A, which computes in half precision."""

import importlib

import pytest

import selfcheck
from common.npu.selfcheck import Golden, run_phase

pytestmark = pytest.mark.npu_sim
QUICK = ("anchors", "targets", "loss and gradients", "detections")


def run(model, name, npu, soc="Ascend910B3"):
    """Replay the phase of a name; its outcome passed, and no operator was left to the host."""
    phases = importlib.import_module(f"{model}.selfcheck").PHASES
    phase = next(phase for phase in phases if phase.name == name)
    if soc == "Ascend910A":  # the kernels are its own, what torch_npu asked at its start is not
        phase = phase._replace(tolerance=phase.tolerance_in_half)
    outcome = run_phase(phase, Golden(model), npu)
    assert outcome.passed, outcome.line(model)
    assert not outcome.without_kernel


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("model", selfcheck.MODELS)
def test_quick_phases_pass(npu, model, name):
    run(model, name, npu)


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910A"])
@pytest.mark.parametrize("model", ["ssd_resnet34", "fcos"])
def test_a_forward_pass_passes(npu, model, soc, monkeypatch):
    monkeypatch.setenv("SIMULATED_NPU_SOC", soc)
    run(model, "forward", npu, soc)
