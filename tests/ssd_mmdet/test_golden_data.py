"""Every golden file of ssd_mmdet about data, within the tolerances of its README.

Draws of the original's generator are met by the reference transform; the product gets the same
numbers and must give the same boxes, and the same image to a grey level on average.
"""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from common.coco.evaluation import evaluate
from common.coco.images import read_image
from ssd_mmdet import data
from ssd_mmdet.augment import augment
from ssd_mmdet.data import (
    Batch,
    TrainingSet,
    epoch_order,
    iterations_per_epoch,
    orientation_groups,
    prepare_image,
    training_records,
)
from ssd_mmdet.postprocess import detect
from tests.ssd_mmdet import reference
from tests.ssd_mmdet.conftest import record_of
from tests.ssd_mmdet.test_golden import assert_same_detections, check_probe


def test_dataset(golden, recipe, tiny_train):
    expected = golden("dataset.json")
    records = training_records(tiny_train)
    assert recipe.repeat == expected["repeat"]
    assert len(records) == expected["length"]
    assert [name.decode() for name in records.file_names.tolist()] == expected["files"]
    assert (records.sizes[:, 1] > records.sizes[:, 0]).tolist() == [
        f == 1 for f in expected["flag"]
    ]
    dataset = TrainingSet(records, recipe, seed=0)
    truths = [dataset.ground_truth(record) for record in range(len(records))]
    assert [len(boxes) for boxes, *_ in truths] == expected["boxes"]
    assert [len(crowds) for *_, crowds in truths] == expected["ignored"]
    boxes, labels, crowds = truths[record_of(records, "000000184613.jpg")]
    assert boxes.dtype == crowds.dtype == np.float32
    assert_array_equal(boxes, np.float32(expected["first_boxes"]))
    assert_array_equal(labels, expected["first_labels"])


def test_sampler(golden, recipe, tiny_train):
    expected = golden("sampler.json")
    records = training_records(tiny_train)
    groups = orientation_groups(records, recipe)
    assert sum(map(len, groups)) == expected["length"]
    order = epoch_order(groups, 8, 1, seed=5, epoch=0)  # as np.random.seed(5) leaves numpy's
    assert order.tolist() == expected["group"]
    assert iterations_per_epoch(records, recipe, 1) * 8 == expected["group_len"]
    for epoch in (0, 1):
        order = epoch_order(groups, 8, 2, seed=0, epoch=epoch).reshape(2, -1)
        for rank in (0, 1):
            assert order[rank].tolist() == expected["dist"][f"rank{rank}_of_2_epoch{epoch}"]
    assert iterations_per_epoch(records, recipe, 2) * 8 == order.shape[1]


class PortDraws:
    """The original's recorded draws, in the product's order, behind Python's interface.

    The original draws the contrast before or after saturation and hue; the product before. The
    product draws no window for a limit that no window can meet.
    """

    def __init__(self, run):
        draws = iter(run["draws"])

        def take(name):
            kind, _, result = next(draws)
            assert kind == name
            return result

        def change():
            drawn = take("randint")
            return [drawn, take("uniform")] if drawn else [drawn]

        shift = change()
        before = take("randint") == 1
        contrast = change() if before else None
        rest = change() + change()
        contrast = contrast or change()
        permuted = take("randint")
        order = [permuted, take("permutation")] if permuted else [permuted]
        # Positions in BGR; the product has RGB.
        order[1:] = [[2 - k for k in reversed(channels)] for channels in order[1:]]
        self._colour = iter(shift + contrast + rest + order)
        self._rest = list(draws)
        self._flip = run["flip"] == ["horizontal"]

    def randrange(self, count):
        assert count == 2
        return next(self._colour)

    def sample(self, population, count):
        assert (population, count) == (range(3), 3)
        return next(self._colour)

    def choice(self, limits):
        while self._rest[0][0] == "uniform":
            self._rest.pop(0)
        kind, (modes,), limit = self._rest.pop(0)
        assert kind == "choice"
        assert limits == tuple(modes)
        return limit

    def uniform(self, low, high):
        value = next(self._colour, None)
        if value is None:
            kind, given, value = self._rest.pop(0)
            assert kind == "uniform"
            assert given == pytest.approx([low, high][: len(given)])
        assert min(low, high) <= value <= max(low, high)
        return value

    def random(self):
        return 0.0 if self._flip else 1.0


@pytest.mark.parametrize("number", range(12))
def test_training_sample_under_the_originals_draws(golden, recipe, tiny_train, monkeypatch, number):
    run, name = golden("augment.json")[number], f"run{number}"
    expected = golden("augment.npz")
    records = training_records(tiny_train)
    dataset, record = TrainingSet(records, recipe, seed=0), record_of(records, run["file"])
    assert record == run["index"]

    draws = np.random.RandomState(run["seed"])
    given = read_image(records.path(record))
    image, boxes, labels = reference.training_sample(given, *dataset.ground_truth(record), draws)
    check_probe(expected, name, image, atol=1e-3)
    assert_allclose(boxes, expected[f"{name}_boxes"], rtol=0, atol=1e-4)
    assert_array_equal(labels, expected[f"{name}_labels"])

    monkeypatch.setattr(data.random, "Random", lambda _: PortDraws(run))
    sample = dataset[0, 0, record]
    made, boxes = augment(Batch(*(part.unsqueeze(0) for part in sample)), recipe)
    assert_allclose(boxes[0, sample.valid], expected[f"{name}_boxes"], rtol=0, atol=1e-3)
    assert_array_equal(sample.labels[sample.valid], expected[f"{name}_labels"])
    assert (made[0] - image).abs().mean() <= 1
    assert (made[0] - image).mean().abs() <= 0.1


def test_evaluation_input(golden, recipe, tiny_val):
    expected = golden("preprocess.npz")
    for i in (0, 1):
        record = record_of(tiny_val, str(expected[f"name{i}"]))
        height, width = tiny_val.sizes[record]
        scale = np.float32([300 / width, 300 / height] * 2)
        assert_allclose(scale, expected[f"scale_factor{i}"], rtol=1e-7)
        made = prepare_image(read_image(tiny_val.path(record)), recipe)
        check_probe(expected, f"image{i}", made, atol=1e-4)


def test_end_to_end(golden, recipe, filled_model, tiny_val):
    expected = golden("end_to_end.npz")
    record = record_of(tiny_val, str(expected["image"].item()))
    with torch.no_grad():
        image = prepare_image(read_image(tiny_val.path(record)), recipe)
        outputs = filled_model(image.unsqueeze(0))
    check_probe(expected, "cls", outputs[1], atol=2e-4)
    check_probe(expected, "reg", outputs[0], atol=2e-4)
    (found,) = detect(outputs, torch.from_numpy(tiny_val.sizes[[record]]), recipe)
    boxes, scores, labels = (expected[part] for part in ("boxes", "scores", "labels"))
    # Scores of logits that are 2e-4 off: 3.6e-6 on a processor without AVX-512.
    assert_same_detections(found, boxes, scores, labels, box_atol=2e-2, score_atol=5e-6)


def test_coco_metrics(golden, tiny_val):
    rows = [
        [item["image_id"], *item["bbox"], item["score"], item["category_id"]]
        for item in golden("coco_results.json")
    ]
    found = evaluate(tiny_val.annotation_file, np.array(rows, dtype=np.float64)).mmdet()
    for name, value in golden("coco_metrics.json").items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, abs=0.0005 + 1e-9)  # it has 3 decimals
        else:
            assert found[name] == value
