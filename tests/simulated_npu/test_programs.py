"""The programs and launch scripts of every model on simulated NPUs, with the CPU's results.

What else is particular to a model is in its own folder here.
"""

import importlib
import json
import shutil
import signal
from types import SimpleNamespace

import onnx
import pytest

from common.errors import UserError
from tests import scripts
from tests.scripts import assert_same_state, losses
from tests.simulated_npu.programs import assert_same_detections, launch, on_cpu

pytestmark = pytest.mark.npu_sim

# Flags that make a network small, and thresholds that its scores after four steps pass.
SMALL = {
    "fcos": (
        "--backbone=resnet14", "--channels=64", "--tower_convs=1", "--img_scale=64,107",
        "--eval_shapes=two", "--score_threshold=0.005",
    ),
    "m2det": ("--recipe=quickstart", "--augment"),
    "ssd_mmdet": ("--width=0.0625", "--repeat=1", "--score_threshold=0.01"),
    "ssd_resnet34": ("--backbone=resnet10", "--threshold=0"),
}  # fmt: skip
FOUR_STEPS = ("--batch_size=2", "--num_workers=0", "--amp=O0", "--max_iters=4", "--log_interval=1",
              "--save_interval=2", "--keep=9")  # fmt: skip
EXPORT = {"fcos": ("pthtar2onx", "--shape", 64, 96)}
MODELS = [
    "fcos",
    "ssd_mmdet",
    pytest.param("ssd_resnet34", marks=pytest.mark.every_version),
    pytest.param("m2det", marks=pytest.mark.again),
]


@pytest.fixture(scope="module")
def model(request):
    """Name, folder and flags of a model."""
    folder = scripts.ROOT / request.param
    return SimpleNamespace(name=request.param, folder=folder, flags=SMALL[request.param])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scripts.subset(tmp_path_factory.mktemp("coco") / "coco", train=8, val=4)


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    """Four steps with evaluation, on two NPUs."""
    output = tmp_path_factory.mktemp("npu") / "run"
    flags = (*model.flags, *FOUR_STEPS, f"--data={data}", f"--output_dir={output}")
    scripts.run(str(model.folder / "train.py"), *flags, "--device=npu", ranks=2)
    return output


@pytest.fixture
def call(model):
    """`call("train", *flags)`: the `main` of a program, on the NPU in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield lambda program, *flags: importlib.import_module(f"{model.name}.{program}").main(
        list(map(str, flags))
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_two_ranks_over_hccl_equal_two_over_gloo(model, trained, data, tmp_path, call, capsys):
    """And what they leave is of use everywhere. (One test: `trained` takes a while.)"""
    output = tmp_path / "gloo"
    where = (*model.flags, f"--data={data}", "--num_workers=0")
    on_cpu(model.folder / "train.py", *where, *FOUR_STEPS, f"--output_dir={output}", ranks=2)
    assert list(losses(trained)) == [1, 2, 3, 4]
    assert losses(trained) == losses(output)
    assert_same_state(trained / "iter_4.pt", output / "iter_4.pt")
    assert_same_detections(trained, output)

    checkpoint = f"--checkpoint={trained / 'iter_4.pt'}"
    call("evaluate", *where, checkpoint, f"--output_dir={tmp_path / 'npu'}", "--device=npu")
    assert_same_detections(trained, tmp_path / "npu")
    on_cpu(model.folder / "evaluate.py", *where, checkpoint, f"--output_dir={tmp_path / 'cpu'}")
    assert_same_detections(trained, tmp_path / "cpu")

    flags = (f"--img={data / 'val2017'}", f"--show_dir={tmp_path}", "--min_score=0.01")
    assert call("demo", checkpoint, *flags, "--device=npu") == 0
    assert "4 of 4 images drawn" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())) == 4


@pytest.mark.parametrize("model", SMALL, indirect=True)
def test_the_export_of_a_checkpoint(model, data, tmp_path, call, capsys):
    """Beside torch_npu, which changes torch in many places."""
    run = ("--max_iters=1", f"--data={data}", f"--output_dir={tmp_path}", "--kind=perf")
    call("train", *model.flags, *FOUR_STEPS, *run, "--device=npu")
    checkpoint = f"--checkpoint={tmp_path / 'iter_1.pt'}"
    file = tmp_path / "network.onnx"
    call(*EXPORT.get(model.name, ("pthtar2onnx",)), checkpoint, f"--output_file={file}")
    assert "onnxruntime against torch" in capsys.readouterr().out
    assert onnx.load(file).graph.output


@pytest.mark.parametrize("model", ["ssd_mmdet"], indirect=True)
def test_compile_is_refused(model, data, tmp_path, call):
    where = (f"--data={data}", f"--output_dir={tmp_path / 'run'}", "--device=npu")
    with pytest.raises(UserError, match=r"^--compile: only for cuda and cpu, not for npu; "):
        call("train", *model.flags, *FOUR_STEPS, *where, "--compile")
    assert not (tmp_path / "run").exists()


@pytest.mark.every_version
@pytest.mark.parametrize("model", ["ssd_resnet34"], indirect=True)
def test_two_ranks_resume(model, trained, data, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(trained / "iter_2.pt", output)
    flags = (*model.flags, *FOUR_STEPS, f"--data={data}", f"--output_dir={output}")
    program = str(model.folder / "train.py")
    scripts.run(program, *flags, "--device=npu", "--resume=auto", ranks=2)
    assert list(losses(output)) == [3, 4]
    assert_same_state(trained / "iter_4.pt", output / "iter_4.pt")


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_the_launch_script_of_one_device_and_a_resumed_run(model, data, tmp_path, call):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = (*model.flags, *FOUR_STEPS)
    summary = launch(model.folder / "test/train_performance_1p.sh", data, whole, *flags)
    assert float(summary["ActualFPS"]) > 0
    assert summary["CaseName"].endswith("_bs2_1p_perf")
    resumed.mkdir()
    shutil.copy(whole / "iter_2.pt", resumed)
    where = (f"--data={data}", f"--output_dir={resumed}", "--device=npu", "--kind=perf")
    call("train", *flags, *where, "--resume=auto")
    assert list(losses(resumed)) == [3, 4]
    assert_same_state(whole / "iter_4.pt", resumed / "iter_4.pt")
