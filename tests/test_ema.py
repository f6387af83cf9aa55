"""`--ema` in the programs of all models: a step, what is evaluated and saved, who uses it."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.loop import TrainingLoop
from common.fps.progress import Progress
from common.npu import checkpoint
from common.npu.precision import Precision
from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from tests import scripts
from tests.small_models import ALL, TFRECORD, module
from tests.test_own_data import SHORT, SMALL
from tests.watch import Watch

SMALL_FLAGS = {**SMALL, TFRECORD: ("--recipe=small",)}
PRESETS = {"ssd_mmdet": "1p", TFRECORD: "small"}
CHANGES = {
    "ssd_mmdet": {"width": 1 / 16},
    "fcos": {"tower_convs": 1, "channels": 32, "img_scale": ("96,160",)},
}
EVERY_BOX = ("--score_threshold=0",)
LERP = "aten::_foreach_lerp_.Scalar"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Real images of one class, in COCO's layout and as records."""
    folder = scripts.subset(
        tmp_path_factory.mktemp("data") / "coco", train=6, val=2, classes=["person"]
    )
    for split in ("train", "val"):
        annotations = folder / f"annotations/instances_{split}2017.json"
        convert(folder / f"{split}2017", annotations, folder / f"records/{split}2017", 1)
    return folder


def where(model, data, split="train"):
    if model != TFRECORD:
        return [f"--data={data}"]
    words = [f"--validation_file_pattern={data}/records/val2017*"]
    words.append(f"--val_json_file={data}/annotations/instances_val2017.json")
    if split == "train":
        words += [f"--training_file_pattern={data}/records/train2017*", "--mode=train_and_eval"]
        words.append("--resume=none")
    return words


def small_loop(model, data, *flags):
    """The program's loop in fp32."""
    train = module(model, "train")
    recipe = replace(
        train.RECIPES[PRESETS.get(model, "quickstart")],
        batch_size=2,
        amp="O0",
        **CHANGES.get(model, {}),
    )
    words = [*where(model, data), "--device=cpu", "--max_iters=9", *flags]
    return TrainingLoop(train, recipe, words, Precision(torch.device("cpu")))


@pytest.mark.parametrize("model", ALL)
def test_a_step_has_one_operator_more_and_its_averages_are_the_formulas(model, data, monkeypatch):
    monkeypatch.setattr(Progress, "log_due", lambda *_: False)  # which would read the losses
    steps = {}
    for flag in ("--ema=0", "--ema=0.25"):
        with small_loop(model, data, flag) as loop:
            network = loop.state.model
            averaged = loop.state.ema.model
            assert (averaged is network) == (flag == "--ema=0")
            batch = next(iter(loop.loader))
            expected = dict(network.state_dict())
            expected = {name: value.clone() for name, value in expected.items()}
            # The warm-up keeps 1/10, 2/11, then 3/12, which is the decay.
            for number, kept in enumerate((1 / 10, 2 / 11, 0.25, 0.25)):
                watch = Watch() if number == 1 else None  # between epochs values are read
                loop.step(batch, watch)
                if watch is not None:
                    steps[flag] = Counter(name for name, *_ in watch.calls)
                for name, value in network.state_dict().items():
                    if value.is_floating_point():
                        expected[name] = kept * expected[name] + (1 - kept) * value
                    else:
                        expected[name] = value
            if averaged is not network:
                assert averaged.state_dict().keys() == expected.keys()
                for name, value in averaged.state_dict().items():
                    torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert LERP not in steps["--ema=0"]
    assert steps["--ema=0.25"] - steps["--ema=0"] == {LERP: 1}
    assert steps["--ema=0"] - steps["--ema=0.25"] == {}


@pytest.mark.parametrize(
    "model",
    [
        "ssd_resnet34",
        "fcos",
        TFRECORD,
        pytest.param("ssd_mmdet", marks=pytest.mark.again),
        pytest.param("m2det", marks=pytest.mark.again),
    ],
)
def test_the_averages_are_evaluated_saved_and_used(model, data, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*SMALL_FLAGS[model], *SHORT, *EVERY_BOX, "--no-analysis", "--log_interval=1"]
    module(model, "train").main(
        [*words, *where(model, data), f"--output_dir={run}", "--ema=0.9", "--lr=0.01"]
    )
    assert "--ema 0.9: the averages of the weights are evaluated" in capsys.readouterr().out
    state = checkpoint.load(run / "iter_2.pt")
    assert state["ema"]["updates"] == 2
    assert state["ema"]["model"].keys() == state["model"].keys()
    evaluated = results(model, run)
    assert evaluated == evaluate(model, data, run / "iter_2.pt", tmp_path / "averages")
    assert "loaded, the averages of --ema" in capsys.readouterr().out
    del state["ema"]
    (tmp_path / "raw").mkdir()
    checkpoint.save(tmp_path / "raw" / "iter_2.pt", state)
    assert evaluated != evaluate(model, data, tmp_path / "raw/iter_2.pt", tmp_path / "of_raw")
    assert "averages of --ema" not in capsys.readouterr().out
    # A new run starts from them too.
    flags = [f"--checkpoint={run}/iter_2.pt"]
    if model == TFRECORD:
        flags = [f"--resnet_checkpoint={run}/iter_2.pt"]
    module(model, "train").main(
        [*words, *where(model, data), *flags, f"--output_dir={tmp_path}/next", "--max_iters=1"]
    )
    assert "loaded, the averages of --ema" in capsys.readouterr().out
    assert "ema" not in checkpoint.load(tmp_path / "next" / "iter_1.pt")


@pytest.mark.again
def test_averages_go_with_frozen_stages_parts_patience_and_background_metrics(data, tmp_path):
    train = module("ssd_resnet34", "train").main
    words = [*SMALL_FLAGS["ssd_resnet34"], *SHORT, *EVERY_BOX, "--no-analysis", f"--data={data}"]
    start = tmp_path / "start/iter_2.pt"
    train([*words, f"--output_dir={start.parent}", "--kind=perf"])
    words += [
        f"--checkpoint={start}", "--ema=0.5", "--freeze=1", "--accumulate=2", "--patience=1",
        "--eval_interval=1", "--lr=0.01", "--max_iters=9", "--save_interval=3",
    ]  # fmt: skip
    train([*words, f"--output_dir={tmp_path}/waits"])
    train([*words, f"--output_dir={tmp_path}/goes_on", "--background_metrics"])
    for name in ("waits", "goes_on"):
        log = (tmp_path / name / "train_0.log").read_text()
        assert "(--patience): training ends here" in log
    scripts.assert_same_state(tmp_path / "waits/best.pt", tmp_path / "goes_on/best.pt")
    before = checkpoint.load(start)["model"]
    averages = checkpoint.load(tmp_path / "waits/best.pt")["ema"]["model"]
    changed = {name for name, value in averages.items() if not torch.equal(value, before[name])}
    stem = tuple(name for name in averages if name.startswith(("model.0.", "model.1.", "model.3.")))
    assert changed.isdisjoint(stem)
    assert changed.issuperset(name for name in averages if name not in stem)


def evaluate(model, data, file, output):
    """What evaluate.py detects with a checkpoint."""
    output.mkdir()
    words = [*SHORT[:3], *EVERY_BOX, "--no-analysis", *where(model, data, "val")]
    if model == TFRECORD:
        (output / file.name).symlink_to(file)
    else:
        words.append(f"--checkpoint={file}")
    module(model, "evaluate").main([*words, f"--output_dir={output}"])
    return results(model, output)


def results(model, folder):
    if model == TFRECORD:
        folder = folder / "eval"
    return json.loads((folder / "results.bbox.json").read_text())
