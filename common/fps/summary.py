"""What a finished run leaves for reports: `<CaseName>.log`, the loss list and the closing lines.

Names, keys and their order are those of the original launch scripts' summaries. The original
forgot the number of devices in TrainingTime; here it is the time of one iteration.
"""

import platform
from pathlib import Path

from common.files import write_atomically


def write_summary(folder: Path, case: tuple, seconds, fps=None, accuracy=None, losses=()) -> list:
    """Write `<CaseName>.log` and, of logged total `losses`, `train_<CaseName>_loss.txt`.

    `case`: network, batch size of a rank, number of ranks, and "acc", "perf" or "eval"; `seconds`
    of the whole run. Returns the closing lines, to be printed; a figure not given has no line.
    """
    network, batch_size, rank_size, kind = case
    name = f"{network}_bs{batch_size}_{rank_size}p_{kind}"
    values = {"Network": network, "RankSize": rank_size, "BatchSize": batch_size}
    values |= {"DeviceType": platform.machine(), "CaseName": name}
    closing = ["------------------ Final result ------------------"]
    if fps is not None:
        values["ActualFPS"] = f"{fps:.2f}"
        values["TrainingTime"] = f"{rank_size * batch_size * 1000 / fps:.2f}"  # ms an iteration
        closing.append(f"Final Performance images/sec : {fps:.2f}")
    if accuracy is not None:
        values["TrainAccuracy"] = f"{accuracy:.5f}"
        closing.append(f"Final Train Accuracy : {accuracy:.5f}")
    if losses:
        values["ActualLoss"] = f"{losses[-1]:.4f}"
        text = "".join(f"{loss:.4f}\n" for loss in losses)
        write_atomically(folder / f"train_{name}_loss.txt", text.encode())
    values["E2ETrainingTime"] = f"{seconds:.0f}"
    text = "".join(f"{key} = {value}\n" for key, value in values.items())
    write_atomically(folder / f"{name}.log", text.encode())
    return [*closing, f"E2E Training Duration sec : {seconds:.0f}"]
