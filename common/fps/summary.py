"""What a finished run leaves for reports: `<CaseName>.log`, the loss list and the closing lines.

Names, keys and their order are those of the original launch scripts' summaries. The original
forgot the number of devices in TrainingTime; here it is the time of one iteration.
"""

import platform
from collections.abc import Iterable
from pathlib import Path

from common.npu.files import write_atomically


def case_name(network: str, batch_size: int, rank_size: int, kind: str) -> str:
    """`<Network>_bs<B>_<N>p_<acc|perf|eval>`; `batch_size` is that of one rank."""
    return f"{network}_bs{batch_size}_{rank_size}p_{kind}"


def write_summary(
    folder: str | Path,
    *,
    network: str,
    batch_size: int,
    rank_size: int,
    kind: str,
    seconds: float,
    fps: float | None = None,
    accuracy: float | None = None,
    loss: float | None = None,
) -> Path:
    """Write `<CaseName>.log`, lines of `Key = value`, and return its path.

    `kind` "acc" needs `fps`, `accuracy` and `loss`, "perf" `fps` and `loss`, "eval" `accuracy`.
    `seconds` is the duration of the whole run.
    """
    case = case_name(network, batch_size, rank_size, kind)
    values = {
        "Network": network,
        "RankSize": rank_size,
        "BatchSize": batch_size,
        "DeviceType": platform.machine(),
        "CaseName": case,
    }
    if kind != "eval":
        values["ActualFPS"] = f"{fps:.2f}"
        values["TrainingTime"] = f"{rank_size * batch_size * 1000 / fps:.2f}"  # ms an iteration
    if kind != "perf":
        values["TrainAccuracy"] = f"{accuracy:.5f}"
    if kind != "eval":
        values["ActualLoss"] = f"{loss:.4f}"
    values["E2ETrainingTime"] = f"{seconds:.0f}"
    lines = "".join(f"{key} = {value}\n" for key, value in values.items())
    return write_atomically(Path(folder) / f"{case}.log", lines.encode())


def write_losses(folder: str | Path, case: str, losses: Iterable[float]) -> Path:
    """Write `train_<CaseName>_loss.txt`: the total loss of each logged line, one a line."""
    text = "".join(f"{loss:.4f}\n" for loss in losses)
    return write_atomically(Path(folder) / f"train_{case}_loss.txt", text.encode())


def final_lines(
    *, seconds: float, fps: float | None = None, accuracy: float | None = None
) -> list[str]:
    """The closing lines of a run, to be printed; a figure that was not taken has no line."""
    lines = ["------------------ Final result ------------------"]
    if fps is not None:
        lines.append(f"Final Performance images/sec : {fps:.2f}")
    if accuracy is not None:
        lines.append(f"Final Train Accuracy : {accuracy:.5f}")
    lines.append(f"E2E Training Duration sec : {seconds:.0f}")
    return lines
