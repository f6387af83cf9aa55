import platform

import pytest

from common.fps.summary import write_summary

CASE = {"network": "SSD", "batch_size": 8, "num_ranks": 8}
HEAD = f"Network = SSD\nRankSize = 8\nBatchSize = 8\nDeviceType = {platform.machine()}\n"
TITLE = "------------------ Final result ------------------"


@pytest.mark.parametrize(
    ("kind", "figures", "rest"),
    [
        (
            "acc",
            {"fps": 640.0, "accuracy": 0.255, "losses": [7.5, 3.14159]},
            "ActualFPS = 640.00\nTrainingTime = 100.00\nTrainAccuracy = 0.25500\n"
            "ActualLoss = 3.1416\n",
        ),
        (
            "perf",
            {"fps": 640.0, "losses": [7.5, 3.14159]},
            "ActualFPS = 640.00\nTrainingTime = 100.00\nActualLoss = 3.1416\n",
        ),
        ("eval", {"accuracy": 0.255}, "TrainAccuracy = 0.25500\n"),
    ],
)
def test_summary_has_the_keys_in_order(tmp_path, kind, figures, rest):
    write_summary(tmp_path, **CASE, kind=kind, seconds=3661.4, **figures)
    name = f"SSD_bs8_8p_{kind}"
    text = (tmp_path / f"{name}.log").read_text()
    assert text == f"{HEAD}CaseName = {name}\n{rest}E2ETrainingTime = 3661\n"
    assert (tmp_path / f"train_{name}_loss.txt").exists() == (kind != "eval")


def test_losses_are_one_a_line(tmp_path):
    write_summary(tmp_path, "FCOS", 2, 1, "perf", seconds=1, fps=1.0, losses=[7.5, 3.25])
    assert (tmp_path / "train_FCOS_bs2_1p_perf_loss.txt").read_text() == "7.5000\n3.2500\n"


def test_closing_lines_name_only_what_was_measured(tmp_path):
    assert write_summary(
        tmp_path, **CASE, kind="acc", seconds=12.6, fps=351.346, accuracy=0.23509
    ) == [
        TITLE,
        "Final Performance images/sec : 351.35",
        "Final Train Accuracy : 0.23509",
        "E2E Training Duration sec : 13",
    ]
    lines = write_summary(tmp_path, **CASE, kind="eval", seconds=1)
    assert lines == [TITLE, "E2E Training Duration sec : 1"]
