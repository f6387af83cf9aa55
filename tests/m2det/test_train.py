"""What the training program starts from, without a run."""

import pytest
import torch

from m2det import train
from m2det.config import RECIPES


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
