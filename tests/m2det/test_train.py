"""What the training program starts from, without a run."""

from dataclasses import asdict

import pytest
import torch

from common.npu import checkpoint
from m2det import demo, evaluate, pthtar2onnx, train
from m2det.config import RECIPES
from tests.scripts import TINY


def test_the_ports_backbone_is_taken_where_it_is_there_and_fits(tmp_path, monkeypatch):
    path = tmp_path / "vgg16_reducedfc.pth"
    monkeypatch.setattr(train, "PRETRAINED", path)
    assert train.default_backbone(RECIPES["512_vgg"]) == []
    torch.save({"0.weight": torch.zeros(64, 3, 3, 3)}, path)
    (state,) = train.default_backbone(RECIPES["512_vgg"])
    assert str(state["path"]) == str(path)
    assert train.default_backbone(RECIPES["320_resnet101"]) == []


@pytest.mark.parametrize("flag", ["--checkpoint", "--checkpoint-path", "--pth-path", "--pth_path"])
def test_names_of_the_checkpoint(flag):
    assert train.parse([f"{flag}=best.pt"]).checkpoint == "best.pt"
    assert train.parse([flag, "best.pt"]).checkpoint == "best.pt"
    assert train.parse([]).checkpoint == ""


class StoppedError(Exception):
    """A program is past what the test looks at."""


def stop(*arguments, **options):
    raise StoppedError


@pytest.mark.parametrize("says_its_size", [False, True])
@pytest.mark.parametrize(
    ("program", "what_follows"),
    [
        (train, "m2det.train.read_data"),
        (evaluate, "m2det.detector.Detector.from_checkpoint"),
        (demo, "m2det.detector.Detector.from_checkpoint"),
        (pthtar2onnx, "m2det.detector.Detector.from_checkpoint"),
    ],
)
def test_the_size_of_a_published_detector_is_that_of_the_preset_and_said(
    program, what_follows, says_its_size, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "m2det.pth"
    content = {"model": {"loc.0.bias": torch.zeros(24), "conf.0.bias": torch.zeros(24)}}
    if says_its_size:
        content["recipe"] = asdict(RECIPES["704_vgg"])
    checkpoint.save(file, content)
    monkeypatch.setattr(what_follows, stop)
    words = [f"--checkpoint={file}", "--recipe=320_vgg", f"--output_dir={tmp_path / 'out'}"]
    if program in (train, evaluate):
        words.append(f"--data={TINY}")
    if program is not pthtar2onnx:
        words.append("--device=cpu")
    with pytest.raises(StoppedError):
        program.main(words)
    line = f"{file}: does not say its image size; 320 x 320 of --recipe=320_vgg is taken\n"
    assert (line in capsys.readouterr().out) is not says_its_size
