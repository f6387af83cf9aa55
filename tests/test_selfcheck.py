"""The selfcheck: quick phases on a CPU, what it writes, and how it tells a fault."""

import numpy as np
import pytest
import torch

import selfcheck
from common.errors import UserError
from common.npu.selfcheck import (
    WRONG,
    Golden,
    Phase,
    deviation_of_detections,
    equal_or_wrong,
    relative,
    run_phase,
)
from fcos.selfcheck import PHASES

CPU = torch.device("cpu")
QUICK = PHASES[:4]


def test_the_report_names_versions_phases_and_the_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcos.selfcheck.PHASES", QUICK)
    report = tmp_path / "report.txt"
    assert selfcheck.main(["--device=cpu", "--model=fcos", f"--report={report}"]) == 0
    lines = report.read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()[:-1]
    assert lines[0].startswith("device: cpu")
    assert f"torch {torch.__version__}" in lines[1]
    assert [line.split("  ")[0] for line in lines[3:7]] == ["pass"] * 4
    assert "images/s a process" in lines[7]
    assert lines[8] == "4 of 4 phases pass"


def test_a_phase_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def broken(golden, device):
        raise RuntimeError("no such kernel\nand more")

    phases = (Phase("broken", broken, 1, 1), Phase("far off", lambda *_: 2.0, 1, 1), QUICK[0])
    monkeypatch.setattr("fcos.selfcheck.PHASES", phases)
    flags = ["--device=cpu", "--model=fcos", f"--report={tmp_path / 'report.txt'}"]
    assert selfcheck.main(flags) == 1
    printed = capsys.readouterr().out
    assert "FAIL  fcos          broken              RuntimeError: no such kernel\n" in printed
    assert "FAIL  fcos          far off             deviation  2.0e+00 of 1e+00 allowed" in printed
    assert "1 of 3 phases pass" in printed


def test_a_wrong_weight_is_a_failure(monkeypatch):
    """The rule of the golden weights decides the forward pass: another one must not pass."""
    from fcos import selfcheck as model

    right = model.value_of
    monkeypatch.setattr(model, "value_of", lambda *args: right(*args) * np.float32(1.01))
    forward = next(phase for phase in PHASES if phase.name == "forward")
    assert not run_phase(forward, Golden("fcos"), CPU).passed


@pytest.mark.parametrize("model", selfcheck.MODELS)
def test_quick_phases_of_every_model_pass_on_a_cpu(model):
    phases = __import__(f"{model}.selfcheck", fromlist=["PHASES"]).PHASES
    assert [phase.name for phase in phases] == [phase.name for phase in PHASES]
    golden = Golden(model)
    for phase in phases[:-2]:  # the longer ones are those of the golden tests and the NPU's
        outcome = run_phase(phase, golden, CPU)
        assert outcome.passed, outcome.line(model)


def test_deviations_are_shares_of_the_largest_value():
    assert relative(torch.tensor([1.0, 9.0]), np.array([1.0, 10.0])) == pytest.approx(0.1)
    assert relative(torch.zeros(2), np.zeros(3)) == WRONG
    assert relative(torch.tensor([float("nan")]), np.ones(1)) == WRONG
    assert equal_or_wrong(torch.tensor([1, 2]), np.array([1, 2])) == 0
    assert equal_or_wrong(torch.tensor([1, 3]), np.array([1, 2])) == WRONG


def test_detections_of_equal_scores_may_swap():
    boxes = np.array([[0, 0, 1, 1], [5, 5, 6, 6]], np.float32)
    scores = np.array([0.5, 0.5], np.float32)
    labels = np.array([3, 4])
    swapped = tuple(torch.from_numpy(part[::-1].copy()) for part in (boxes, scores, labels))
    assert deviation_of_detections(swapped, boxes, scores, labels) == 0
    one_less = tuple(part[:1] for part in swapped)
    assert deviation_of_detections(one_less, boxes, scores, labels) == WRONG


def test_without_golden_files_it_says_so():
    with pytest.raises(UserError, match=r"no golden files.*; run it in a whole checkout"):
        Golden("retinanet")
