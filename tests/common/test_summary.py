import platform

import pytest

from common.fps.summary import case_name, final_lines, write_losses, write_summary

RUN = {"network": "SSD", "batch_size": 8, "rank_size": 8, "seconds": 3661.4}
HEAD = f"Network = SSD\nRankSize = 8\nBatchSize = 8\nDeviceType = {platform.machine()}\n"


@pytest.mark.parametrize(
    ("kind", "figures", "rest"),
    [
        (
            "acc",
            {"fps": 640.0, "accuracy": 0.255, "loss": 3.14159},
            "ActualFPS = 640.00\nTrainingTime = 100.00\nTrainAccuracy = 0.25500\n"
            "ActualLoss = 3.1416\n",
        ),
        (
            "perf",
            {"fps": 640.0, "loss": 3.14159},
            "ActualFPS = 640.00\nTrainingTime = 100.00\nActualLoss = 3.1416\n",
        ),
        ("eval", {"accuracy": 0.255}, "TrainAccuracy = 0.25500\n"),
    ],
)
def test_summary_has_the_keys_in_order(tmp_path, kind, figures, rest):
    path = write_summary(tmp_path, kind=kind, **RUN, **figures)
    assert path == tmp_path / f"SSD_bs8_8p_{kind}.log"
    case = f"CaseName = SSD_bs8_8p_{kind}\n"
    assert path.read_text() == HEAD + case + rest + "E2ETrainingTime = 3661\n"


def test_losses_are_one_a_line(tmp_path):
    path = write_losses(tmp_path, case_name("FCOS", 2, 1, "perf"), [7.5, 3.25])
    assert path.name == "train_FCOS_bs2_1p_perf_loss.txt"
    assert path.read_text() == "7.5000\n3.2500\n"


def test_final_lines_name_only_what_was_measured():
    assert final_lines(seconds=12.6, fps=351.346, accuracy=0.23509) == [
        "------------------ Final result ------------------",
        "Final Performance images/sec : 351.35",
        "Final Train Accuracy : 0.23509",
        "E2E Training Duration sec : 13",
    ]
    assert len(final_lines(seconds=1)) == 2
