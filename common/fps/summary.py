"""What a finished run leaves for reports: `<CaseName>.log`, the loss list and the closing lines.

Names, keys and their order are those of the original launch scripts' summaries. The original
forgot the number of devices in TrainingTime; here it is the time of one iteration.
"""

import platform
from collections.abc import Sequence
from pathlib import Path

from common.files import encoded, write_atomically

MILLISECONDS = 1000  # in a second


def write_summary(
    folder: Path,
    network: str,
    batch_size: int,
    num_ranks: int,
    kind: str,
    seconds: float,
    fps: float | None = None,
    accuracy: float | None = None,
    losses: Sequence[float] = (),
) -> list[str]:
    """Write `<CaseName>.log` and, of the logged total losses, `train_<CaseName>_loss.txt`.

    `batch_size` is that of a rank, `kind` is "acc", "perf" or "eval", `seconds` is the time
    since this start of the run. Return the closing lines, to be printed. A figure that is None has
    no line. The losses before a resume are in the run's earlier `.log.json`.
    """
    case_name = f"{network}_bs{batch_size}_{num_ranks}p_{kind}"
    values = {
        "Network": network,
        "RankSize": num_ranks,
        "BatchSize": batch_size,
        "DeviceType": platform.machine(),
        "CaseName": case_name,
    }
    closing_lines = ["------------------ Final result ------------------"]
    if fps is not None:
        values["ActualFPS"] = f"{fps:.2f}"
        values["TrainingTime"] = f"{num_ranks * batch_size * MILLISECONDS / fps:.2f}"
        closing_lines.append(f"Final Performance images/sec : {fps:.2f}")
    if accuracy is not None:
        values["TrainAccuracy"] = f"{accuracy:.5f}"
        closing_lines.append(f"Final Train Accuracy : {accuracy:.5f}")
    if losses:
        values["ActualLoss"] = f"{losses[-1]:.4f}"
        loss_list = "".join(f"{loss:.4f}\n" for loss in losses)
        write_atomically(folder / f"train_{case_name}_loss.txt", encoded(loss_list))
    values["E2ETrainingTime"] = f"{seconds:.0f}"
    summary = "".join(f"{key} = {value}\n" for key, value in values.items())
    write_atomically(folder / f"{case_name}.log", encoded(summary))
    closing_lines.append(f"E2E Training Duration sec : {seconds:.0f}")
    return closing_lines


def read_summary(folder: Path) -> dict[str, str]:
    """Return the values of the newest summary of a training in a folder, nothing without one."""
    paths = [*folder.glob("*p_acc.log"), *folder.glob("*p_perf.log")]
    if not paths:
        return {}
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    values = {}
    for line in newest.read_text().splitlines():
        key, _, value = line.partition(" = ")
        values[key] = value
    return values
