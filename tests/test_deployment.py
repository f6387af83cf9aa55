"""The programs of docs/deployment.md: they find what the detector finds."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from common.npu import checkpoint
from ssd_resnet34 import pthtar2onnx
from ssd_resnet34.config import Recipe
from ssd_resnet34.detector import Detector
from ssd_resnet34.model import build_model
from tests.conftest import TINY
from tests.scripts import ROOT

PHOTO = sorted(TINY.glob("val2017/*.jpg"))[0]
RECIPE = Recipe(backbone="resnet18")
SCORE = 0.3  # that the programs print from


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint with random weights, and its file with detections."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    state = {"model": build_model(RECIPE, 2).state_dict(), "classes": ["cat", "dog"]}
    checkpoint.save(folder / "best.pt", {**state, "recipe": dataclasses.asdict(RECIPE)})
    where = [f"--checkpoint={folder / 'best.pt'}", f"--output_file={folder / 'a.onnx'}"]
    pthtar2onnx.main([*where, "--outputs=detections", "--batch=1", "--opset=13"])
    return folder


def program(name, folder):
    """Write a program of the document to a file and return that."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    (code,) = re.findall(rf"```python\n(# {name}.py .*?)```", text, re.DOTALL)
    assert code.count("\n") <= 22
    file = folder / f"{name}.py"
    file.write_text(code)
    return file


def check_printed(lines, folder):
    """Compare lines of name, score and box with the detector's detections."""
    found = Detector.load(folder / "best.pt", "cpu")(str(PHOTO))
    expected = [row for row in zip(*found, strict=True) if row[1] > SCORE]
    assert len(lines) == len(expected) > 20
    lost = 0
    for box, score, label in expected:
        name = ["cat", "dog"][label]
        for line in lines:
            other_name, *numbers = line.split()
            other = torch.tensor([float(number) for number in numbers])
            close = (other[1:] - box).abs().max() < 3 and abs(other[0] - score) < 0.03
            if close and other_name == name:
                break
        else:
            lost += 1
    # Pillow resizes to a grey level of torch's pixels, so that some scores change their order.
    assert lost <= 0.1 * len(expected)


def test_the_program_for_onnxruntime(exported):
    file = program("onnxruntime_detect", exported)
    command = [sys.executable, file, exported / "a.onnx", PHOTO]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    check_printed(done.stdout.splitlines(), exported)


@pytest.mark.slow
@pytest.mark.again  # installs a package
def test_the_program_for_openvino(exported, tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin/python", "-m", "pip", "install", "--quiet", "openvino", "pillow"]
    subprocess.run(pip, check=True)
    file = program("openvino_detect", exported)
    command = [environment / "bin/python", file, exported / "a.onnx", PHOTO]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    check_printed(done.stdout.splitlines(), exported)
