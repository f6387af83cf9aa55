"""Small runs of the real scripts, for the end-to-end tests."""

from tests import scripts
from tests.scripts import (
    ROOT,
    assert_same_state,
    checkpoints,
    signal_all,
    subset,
    train_lines,
    wait_for_step,
)

__all__ = [
    "assert_same_state",
    "checkpoints",
    "signal_all",
    "subset",
    "train_lines",
    "wait_for_step",
]
MODEL = ROOT / "fcos"
# A small network and small images: a step takes a fraction of a second.
NETWORK = ("--backbone=resnet14", "--channels=64", "--tower_convs=1", "--img_scale=64,107")
SHORT = (*NETWORK, "--device=cpu", "--amp=O0", "--num_workers=0")


def place(script):
    folder = MODEL / "test" if script.startswith("train_") else MODEL
    return str(folder / script)


def run(script, *flags, **options):
    return scripts.run(place(script), *flags, **options)


def running(script, *flags, **options):
    return scripts.running(place(script), *flags, **options)


def losses(output):
    names = ("loss_cls", "loss_bbox", "loss_centerness", "loss", "lr")
    return {line["step"]: tuple(line[name] for name in names) for line in train_lines(output)}


def summary(folder, kind):
    (path,) = folder.glob(f"*_{kind}.log")
    return path.name, dict(line.split(" = ") for line in path.read_text().splitlines())
