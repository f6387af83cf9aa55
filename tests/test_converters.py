"""Programs of others read the exported files and compute what onnxruntime does."""

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest
import torch

from common.npu import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.again]  # install packages

PACKAGES = ("openvino", "onnxslim", "onnxsim", "onnx", "onnxruntime")
# The first that came after opset 17. It reads no IR version above 9, as CANN 7 and 8 do not.
OLD_PACKAGES = ("onnxruntime==1.16.3", "numpy<2")
OLD_PYTHON = (3, 11)  # the last that this onnxruntime is for

# Prints for each batch and converter the largest differences of raw outputs, as JSON.
COMPARE = """
import json, sys
import numpy as np, onnx, onnxruntime, onnxsim, onnxslim, openvino

def run(graph, images):
    content = graph if isinstance(graph, str) else graph.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})

def run_openvino(path, images):
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return list(openvino.Core().compile_model(path, "CPU", exact)(images).values())

path = sys.argv[1]
images = np.load(sys.argv[2])
fixed = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value
result = {}
for batch in [images] if fixed else [images[:1], images]:
    expected = run(path, batch)
    found = {
        "openvino": run_openvino(path, batch),
        "onnxslim": run(onnxslim.slim(path), batch),
        "onnxsim": run(onnxsim.simplify(onnx.load(path))[0], batch),
    }
    for name, outputs in found.items():
        differences = []
        for one, other in zip(expected, outputs):
            scale = max(1.0, float(np.abs(one).max()))
            differences.append(float(np.abs(one - other).max()) / scale)
        result[f"{name}, batch {len(batch)}"] = differences
print(json.dumps(result))
"""
OLD = """
import sys
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
outputs = session.run(None, {session.get_inputs()[0].name: np.load(sys.argv[2])})
print(onnxruntime.__version__, [output.shape for output in outputs])
"""


def small(model):
    """The network of a model in a small form, its recipe, and further entries of a checkpoint."""
    config = importlib.import_module(f"{model}.config")
    build_model = importlib.import_module(f"{model}.model").build_model
    more = {"classes": ["cat", "dog"]}
    if model == "ssd_mmdet":
        recipe = dataclasses.replace(config.RECIPES["1p"], width=1 / 16)
    elif model == "ssd_resnet34":
        recipe = config.Recipe(backbone="resnet18")
    elif model == "ssd_resnet34.tfrecord":
        recipe = dataclasses.replace(config.RECIPES["small"], category_ids=(17, 18))
        more = {"category_ids": [17, 18]}
    elif model == "m2det":
        recipe = dataclasses.replace(config.RECIPES["quickstart"], sfam=True)
    else:
        small_parts = {"backbone": "resnet14", "channels": 64, "tower_convs": 1}
        recipe = dataclasses.replace(config.RECIPES["gn"], **small_parts)
    torch.manual_seed(0)
    return build_model(recipe, 2), recipe, more


@pytest.fixture(scope="module", params=["ssd_mmdet", "ssd_resnet34", "tfrecord", "m2det", "fcos"])
def model(request):
    return request.param.replace("tfrecord", "ssd_resnet34.tfrecord")


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    network, recipe, more = small(model)
    path = tmp_path_factory.mktemp("run") / "iter_3.pt"
    state = {"model": network.state_dict(), "recipe": dataclasses.asdict(recipe), **more}
    checkpoint.save(path, state)
    return path


def environment(folder, packages):
    """Make an environment with packages; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("converters"), PACKAGES)


def export(model, weights, file, *flags):
    program = "pthtar2onx" if model == "fcos" else "pthtar2onnx"
    if model == "fcos":
        flags += ("--shape", "128", "160")
    main = importlib.import_module(f"{model}.{program}").main
    main([f"--checkpoint={weights}", f"--output_file={file}", *flags])


def compare(python, file, folder):
    """Run the converters on a file; return the largest differences by converter and batch."""
    import numpy as np
    import onnx

    sizes = onnx.load(file).graph.input[0].type.tensor_type.shape.dim
    shape = [size.dim_value or 2 for size in sizes]
    np.save(folder / "images.npy", torch.rand(shape).numpy())
    command = [python, "-c", COMPARE, file, folder / "images.npy"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("flags", [("--opset=17",), ("--opset=11", "--batch=2")], ids=" ".join)
def test_raw_outputs(model, weights, python, flags, tmp_path):
    export(model, weights, tmp_path / "a.onnx", "--outputs=raw", *flags)
    differences = compare(python, tmp_path / "a.onnx", tmp_path)
    print(model, flags, differences)
    for name, of_outputs in differences.items():
        assert max(of_outputs) < 1e-4, name


@pytest.mark.parametrize("flags", [("--opset=17",), ("--opset=11", "--batch=2")], ids=" ".join)
def test_scores_of_detections(model, weights, python, flags, tmp_path):
    """Boxes and labels of equal scores may come in another order; the scores are the same."""
    export(model, weights, tmp_path / "a.onnx", "--outputs=detections", *flags)
    differences = compare(python, tmp_path / "a.onnx", tmp_path)
    print(model, flags, differences)
    for name, (_, scores, _) in differences.items():
        assert scores < 1e-4, name


@pytest.fixture(scope="module")
def old_python(tmp_path_factory):
    if sys.version_info[:2] > OLD_PYTHON:
        pytest.skip("there is no old onnxruntime for this Python")
    return environment(tmp_path_factory.mktemp("old"), OLD_PACKAGES)


def test_an_old_onnxruntime_reads_the_file(model, weights, old_python, tmp_path):
    import numpy as np

    file = tmp_path / "a.onnx"
    export(model, weights, file, "--outputs=detections", "--batch=1", "--opset=14")
    height, width = (128, 160) if model == "fcos" else (300, 300)
    if model == "m2det":
        height, width = 320, 320
    np.save(tmp_path / "images.npy", np.random.rand(1, 3, height, width).astype(np.float32))
    command = [old_python, "-c", OLD, file, tmp_path / "images.npy"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("1.16")
