"""`Detector`, as a user's own program calls it, of all models."""

import functools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from tests.scripts import ROOT, TINY, subset
from tests.small_models import ALL, MODELS, TFRECORD, module

NOT_NEEDED = ("tensorboard", "matplotlib", "pycocotools", "tqdm", "torchvision", "onnx")
PHOTOGRAPHS = sorted(str(path) for path in (TINY / "val2017").glob("*.jpg"))[:4]


def load(model, detectors, **options):
    """A detector that has learned nothing, so that any threshold finds what it may."""
    detector_class = module(model, "detector").Detector
    return detector_class.load(detectors[model], device="cpu", **options)


def assert_same(some, others):
    for values, expected in zip(some, others, strict=True):
        assert torch.equal(values, expected)


@pytest.mark.parametrize("model", ALL)
def test_paths_pictures_and_arrays_are_the_same_image(model, detectors):
    detector = load(model, detectors, score_threshold=1e-4)
    path = PHOTOGRAPHS[0]
    picture = Image.open(path).convert("RGB")
    found = detector(path)
    assert len(found) > 0
    assert_same(found, detector(picture))
    assert_same(found, detector(np.asarray(picture)))
    (in_a_list,) = detector([path])
    assert_same(found, in_a_list)
    assert detector([]) == []


@pytest.mark.parametrize("model", ALL)
def test_what_is_found_has_names_and_can_be_drawn(model, detectors):
    found = load(model, detectors, score_threshold=1e-4)(PHOTOGRAPHS[0])
    boxes, scores, labels = found
    assert boxes.shape == (len(found), 4)
    assert found.scores is scores
    assert found.names == [("person", "cat", "dog")[label] for label in labels]
    image = np.asarray(Image.open(PHOTOGRAPHS[0]).convert("RGB"))
    assert np.array_equal(found.image, image)
    drawn = np.asarray(found.draw(min_score=float(scores[-1])))
    assert drawn.shape == image.shape
    assert not np.array_equal(drawn, image)
    assert np.array_equal(np.asarray(found.draw(min_score=2)), image)


@pytest.mark.parametrize("model", ALL)
def test_the_score_threshold_is_taken(model, detectors):
    assert len(load(model, detectors, score_threshold=1e-4)(PHOTOGRAPHS[0])) > 0
    assert len(load(model, detectors, score_threshold=1.0)(PHOTOGRAPHS[0])) == 0


@pytest.mark.parametrize("model", ALL)
def test_the_best_scores_of_the_classes_are_taken(model, detectors, tmp_path):
    file = tmp_path / "best.pt"
    file.symlink_to(detectors[model])
    detector_class = module(model, "detector").Detector
    with pytest.raises(UserError, match=r"no .*metrics\.json with the scores of the best F1"):
        detector_class.load(file, device="cpu", score_threshold="best")
    points = {}
    for name, score in (("person", 2.0), ("cat", -1.0), ("dog", 0.0)):
        points[name] = {"score": score, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    metrics = {"best_f1": {**points["dog"], "score": 2.0}, "classes": []}
    for name, point in points.items():
        metrics["classes"].append({"name": name, "best_f1": point})
    folder = tmp_path / "eval" if model == TFRECORD else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    detector = detector_class.load(file, device="cpu", score_threshold="best")
    assert detector.min_scores.tolist() == [2.0, 2.0, 0.0]
    found = load(model, detectors)(PHOTOGRAPHS[0])
    of_best = detector(PHOTOGRAPHS[0])
    assert of_best.names == [name for name in found.names if name == "dog"]
    assert len(of_best.scores) == len(of_best.boxes) == len(of_best.labels)


@pytest.mark.parametrize("model", ALL)
def test_precision_is_that_of_the_network(model, detectors):
    detector = load(model, detectors, precision="bf16")
    dtypes = set()
    for layer in detector.model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))
    detector(PHOTOGRAPHS[0])
    assert dtypes == {torch.bfloat16}
    with pytest.raises(UserError, match="precision 'fp16': of no use on a CPU; take fp32 or bf16"):
        load(model, detectors, precision="fp16")
    with pytest.raises(UserError, match="precision 'int8': not one of fp32, fp16, bf16"):
        load(model, detectors, precision="int8")


@pytest.mark.parametrize("model", ALL)
def test_threads_find_what_one_finds(model, detectors):
    detector = load(model, detectors, score_threshold=1e-3)
    alone = [detector(path) for path in PHOTOGRAPHS]
    found = {}

    def detect(i):
        found[i] = detector(PHOTOGRAPHS[i])

    threads = [threading.Thread(target=detect, args=(i,)) for i in range(len(PHOTOGRAPHS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert_same(found[i], expected)


@pytest.mark.parametrize("model", ALL)
def test_nothing_of_training_is_needed(model, detectors):
    program = f"""
import sys
for name in {NOT_NEEDED!r}:
    sys.modules[name] = None  # importing it fails
from {model.replace("/", ".")}.detector import Detector
print(len(Detector.load({str(detectors[model])!r}, device="cpu")({PHOTOGRAPHS[0]!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdecimal()


@pytest.mark.parametrize("model", MODELS)
def test_the_speed_is_measured_instead_of_accuracy(
    model,
    detectors,
    tmp_path,
    monkeypatch,
    capsys,
):
    evaluate = module(model, "evaluate")
    brief = functools.partial(evaluate.report_speed, seconds=0.1)
    monkeypatch.setattr(evaluate, "report_speed", brief)
    data = subset(tmp_path / "coco", val=3, classes=["person", "cat", "dog"])
    where = (f"--data={data}", f"--output_dir={tmp_path}", f"--checkpoint={detectors[model]}")
    evaluate.main([*where, "--device=cpu", "--benchmark=1,2"])
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in table] == ["1", "2"]
    speed = json.loads((tmp_path / "metrics.json").read_text())["benchmark"]
    assert speed["flops"] > 0
    assert [row["batch_size"] for row in speed["batches"]] == [1, 2]
