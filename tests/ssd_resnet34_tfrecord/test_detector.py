"""A detector as users call it, its evaluation in half precision, and what a resumed run checks."""

import dataclasses
import functools
import json
import re
import sys

import numpy as np
import pytest
import torch

from common.coco.evaluation import STATS
from common.errors import UserError
from common.npu import checkpoint, overlap
from ssd_resnet34.tfrecord import evaluate, train
from ssd_resnet34.tfrecord.config import RECIPES
from ssd_resnet34.tfrecord.detector import Detector
from ssd_resnet34.tfrecord.model import build_model
from tests import scripts

SMALL = RECIPES["small"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder with a checkpoint of a small detector with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    state = {
        "model": build_model(SMALL, len(SMALL.category_ids)).state_dict(),
        "recipe": dataclasses.asdict(SMALL),
        "category_ids": list(SMALL.category_ids),
        "iteration": 1,
    }
    checkpoint.save(folder / "iter_1.pt", state)
    return folder


def test_none_one_and_more_images_than_a_batch(run_folder):
    detector = Detector.load(run_folder / "iter_1.pt", "cpu")
    detector.recipe = dataclasses.replace(detector.recipe, eval_batch_size=2, score_threshold=0.0)
    batch_sizes = []
    detector.model.register_forward_pre_hook(
        lambda _module, inputs: batch_sizes.append(len(inputs[0]))
    )
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 30 + k, 3), np.uint8) for k in range(5)]
    assert detector([]) == []
    assert batch_sizes == []
    detections = detector(images)
    assert batch_sizes == [2, 2, 1]
    assert len(detections) == 5
    alone = detector(images[3])
    torch.testing.assert_close(alone.scores, detections[3].scores)
    assert len(alone.scores) > 0


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], torch.float32),
        pytest.param(["--amp=O1", "--amp_dtype=bf16"], torch.bfloat16, marks=pytest.mark.again),
    ],
)
def test_evaluation_takes_the_precision_of_its_flags(
    run_folder, golden_dir, tmp_path, monkeypatch, flags, dtype
):
    dtypes = []

    def note_dtype(outputs, recipe):
        dtypes.append(outputs[0].dtype)
        return start_detect(outputs, recipe)

    start_detect = evaluate.start_detect
    monkeypatch.setattr(evaluate, "start_detect", note_dtype)
    annotations = json.loads((golden_dir / "instances_train6.json").read_text())
    annotations["annotations"] = annotations["annotations"][:-3]  # which a converter drops
    (tmp_path / "val.json").write_text(json.dumps(annotations))
    files = [
        f"--validation_file_pattern={golden_dir}/train2017*",
        f"--val_json_file={tmp_path}/val.json",
        f"--model_dir={run_folder}",
    ]
    evaluate.main([*files, "--device=cpu", "--num_workers=0", "--eval_batch_size=4", *flags])
    assert dtypes == [dtype, dtype]
    assert (run_folder / "eval/results.bbox.json").exists()
    metrics = json.loads((run_folder / "eval/metrics.json").read_text())
    assert tuple(metrics)[: len(STATS)] == STATS
    assert metrics["speed"] > 0
    for name in ("analysis.json", "errors.png", "worst_images.png", "suspect_labels.json"):
        assert (run_folder / "eval" / name).stat().st_size > 0


def test_an_accelerators_thread_detects_the_same(run_folder, golden_dir, tmp_path, monkeypatch):
    results = []
    for name, on_cpu in (("at_once", True), ("thread", False)):
        monkeypatch.setattr(overlap, "in_host_memory", lambda device, on_cpu=on_cpu: on_cpu)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "iter_1.pt").symlink_to(run_folder / "iter_1.pt")
        evaluate.main(
            [
                f"--validation_file_pattern={golden_dir}/train2017*",
                f"--val_json_file={golden_dir}/instances_train6.json",
                f"--model_dir={folder}",
                "--device=cpu",
                "--num_workers=0",
                "--eval_batch_size=2",
            ]
        )
        results.append(json.loads((folder / "eval/results.bbox.json").read_text()))
    assert results[0]
    assert results[1] == results[0]


@pytest.mark.again
def test_metrics_in_the_background_are_those_of_a_run_that_waits(golden_dir, tmp_path):
    files = [
        f"--training_file_pattern={golden_dir}/train2017*",
        f"--validation_file_pattern={golden_dir}/train2017*",
        f"--val_json_file={golden_dir}/instances_train6.json",
    ]
    short = ["--recipe=small", "--train_batch_size=2", "--max_per_class=20", "--max_iters=4"]
    where = ["--device=cpu", "--num_workers=0", "--resnet_checkpoint=", "--amp=O0"]
    epochs = ["--num_examples_per_epoch=4", "--evaluation=1,2"]
    val_lines = []
    for name, flag in (("waits", "--no-background_metrics"), ("goes_on", "--background_metrics")):
        folder = tmp_path / name
        train.main([*files, *short, *where, *epochs, f"--model_dir={folder}", flag])
        lines = scripts.json_lines(folder)
        val_lines.append([line for line in lines if line.get("mode") == "val"])
        assert (folder / "eval/results.bbox.json").exists()
    assert [line["steps_done"] for line in val_lines[0]] == [2, 4]
    assert val_lines[0] == val_lines[1]
    scripts.assert_same_state(tmp_path / "waits/best.pt", tmp_path / "goes_on/best.pt")


def test_weights_alone_are_evaluated_without_a_step(
    run_folder, golden_dir, tmp_path, monkeypatch, capsys
):
    state = checkpoint.load(run_folder / "iter_1.pt")
    checkpoint.save(tmp_path / "iter_5.pt", {"model": state["model"]})
    no_rows = np.zeros((0, 7))
    monkeypatch.setattr(evaluate, "detect_all", lambda *arguments: no_rows)
    evaluate.main(
        [
            f"--validation_file_pattern={golden_dir}/train2017*",
            f"--val_json_file={golden_dir}/instances_train6.json",
            f"--model_dir={tmp_path}",
            "--device=cpu",
            "--recipe=small",
        ]
    )
    output = capsys.readouterr().out
    said = f"{tmp_path}/iter_5.pt: does not say its step: the metrics are logged without one\n"
    assert said in output
    assert output.index(said) < output.index("Current AP: 0.00000")
    assert json.loads((tmp_path / "eval/metrics.json").read_text())["AP"] == 0


def test_what_an_evaluation_needs_is_there_before_it_detects(
    run_folder, golden_dir, tmp_path, monkeypatch
):
    def detect_all(*arguments):
        pytest.fail("detected")

    monkeypatch.setattr(evaluate, "detect_all", detect_all)
    flags = [
        f"--validation_file_pattern={golden_dir}/train2017*",
        f"--val_json_file={golden_dir}/instances_train6.json",
        f"--model_dir={tmp_path}",
        "--device=cpu",
    ]
    (tmp_path / "iter_1.pt").symlink_to(run_folder / "iter_1.pt")
    (tmp_path / "eval").touch()
    with pytest.raises(UserError, match=r"/eval cannot be written: File exists; a file is where"):
        evaluate.main(flags)
    (tmp_path / "eval").unlink()
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match="pip install pycocotools faster-coco-eval"):
        evaluate.main(flags)


def test_the_speed_is_measured_instead_of_accuracy(
    run_folder, golden_dir, tmp_path, monkeypatch, capsys
):
    brief = functools.partial(evaluate.report_speed, seconds=0.1)
    monkeypatch.setattr(evaluate, "report_speed", brief)
    (tmp_path / "iter_1.pt").symlink_to(run_folder / "iter_1.pt")
    flags = [
        f"--validation_file_pattern={golden_dir}/train2017*",
        f"--val_json_file={golden_dir}/instances_train6.json",
        f"--model_dir={tmp_path}",
        "--device=cpu",
        "--benchmark=1,2",
    ]
    with pytest.raises(UserError, match=r"--benchmark: train\.py does not measure"):
        train.main(flags)
    evaluate.main(flags)
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [re.split(" INFO - +", line)[1].split()[0] for line in table] == ["1", "2"]
    speed = json.loads((tmp_path / "eval/metrics.json").read_text())["benchmark"]
    assert speed["flops"] > 0
    assert [row["batch_size"] for row in speed["batches"]] == [1, 2]


def test_a_resumed_run_has_the_same_categories(golden_dir, tmp_path):
    flags = [f"--training_file_pattern={golden_dir}/train2017*", "--device=cpu", "--mode=train"]
    flags += ["--recipe=small", "--train_batch_size=2", "--num_workers=0", "--max_iters=1"]
    flags += [f"--model_dir={tmp_path}/run"]
    train.main(flags)
    other_ids = list(SMALL.category_ids)
    other_ids[11] = 12  # instead of stop sign, which no box shows
    with pytest.raises(UserError, match=r"category_ids \(.* 13, .* before, .* 12, .* now"):
        train.main([*flags, "--category_ids", *map(str, other_ids)])
